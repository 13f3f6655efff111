"""Hidden states of packed documents, from a parent or a child, in one process or sharded.

Reads batches of `lit_puzzle.data.documents`; writes nothing. Memory: b B T D bytes for each requested layer.

The model is called as a whole, without logits. It is the FSDP root: its embedding, last norm and head stay gathered
until backward has used them, so that `model.lm_head.weight` is the whole head after the call and inside backward.
Without a backward pass call `release`, because optimizer and checkpoints need sharded weights.

Shapes: B rows, T tokens of a row, D hidden channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lit_puzzle.data.batches import PackedBatch
from lit_puzzle.data.packing import model_inputs


def hidden_states(model: PreTrainedModel, batch: PackedBatch, layers: Sequence[int]) -> list[Tensor]:
    """Return the states (B, T, D) after each of the given layers; those after the last layer have passed the last norm.

    Args:
        model: causal language model of a parent or a child, inside any LoRA wrapper.
        batch: `input_ids` and `position_ids`, (B, T).
        layers: indices of layers.
    """
    nothing = torch.empty(0, dtype=torch.long, device=batch["input_ids"].device)
    inputs = model_inputs(model, batch)
    outputs = model(**inputs, output_hidden_states=sorted(layers), logits_to_keep=nothing)
    return [outputs.hidden_states[layer] for layer in layers]


def release(model: PreTrainedModel) -> None:
    """Free the weights that a sharded model has gathered; does nothing to other models."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
