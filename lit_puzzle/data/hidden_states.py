"""Hidden states of packed documents, from a parent or a child, in one process or sharded.

Reads batches of `lit_puzzle.data.documents`; writes nothing. Bytes it keeps: b B T D per layer that is asked for.

The model is called as a whole, but for its logits: it is the FSDP root, whose embedding, last norm and head stay
gathered until backward has used them. So `model.lm_head.weight` is the whole head after the call, inside backward too.
Where no backward follows, `release` gives it back: optimizer and checkpoints know sharded weights only.

Shapes: B rows, T tokens of a row, D hidden channels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lit_puzzle.data.packing import model_inputs


def hidden_states(model: PreTrainedModel, batch: Mapping[str, Tensor], layers: Sequence[int]) -> list[Tensor]:
    """States (B, T, D) after each of the given layers; those after the last layer have passed the last norm.

    Args:
        model: stock gpt-oss or a child, inside any LoRA wrapper.
        batch: `input_ids` and `position_ids`, (B, T).
        layers: indices of layers.
    """
    nothing = torch.empty(0, dtype=torch.long, device=batch["input_ids"].device)
    inputs = model_inputs(model, batch)
    outputs = model(**inputs, output_hidden_states=sorted(layers), logits_to_keep=nothing)
    return [outputs.hidden_states[layer] for layer in layers]


def release(model: PreTrainedModel) -> None:
    """Gives back what a sharded model has gathered; others stay as they are."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
