"""Which tensors of a checkpoint a training changes, and their values with LoRA merged, in float32.

    linear layer         W + s B A
    embedding            W + s (B A)^T
    stacked parameter    W_e + s (B_e A_e)^T     of expert e; without the transpose where W_e is stored as (out, in)

Every parameter that trains belongs to one tensor of the checkpoint, which `check_saved` checks before training, on a
model without weights: what a checkpoint has no tensor for cannot be saved. Reads headers of the checkpoint; writes
nothing. Memory: of `TrainedTensor.value`, one full tensor and its change in float32.

Source: LoRA, arXiv 2106.09685, section 4.1; PEFT's `ParamWrapper` (adapters on parameters).
Shapes: E experts, R rank, I and O input and output channels.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.training.load_child import adapted, without_weights
from lit_puzzle.training.random_state import RandomStream
from lit_puzzle.training.settings import TrainingSettings
from lit_puzzle.training.sharding import full
from lit_puzzle.training.trainable import without_adapters


@dataclass(frozen=True)
class TrainedTensor:
    """A tensor of the checkpoint that training changes.

    Attributes:
        base: its parameter in the model.
        changes: what each adapter adds to it, computed when called. Every process must call it, with its shards.
    """

    base: nn.Parameter
    changes: list[Callable[[], Tensor]] = field(default_factory=list)

    def value(self) -> Tensor:
        """Return the whole trained tensor: in float32 with adapters, else in the dtype in which it trains."""
        value = full(self.base).detach()
        if self.changes:
            value = value.float()
        for change in self.changes:
            value = value + change().detach()
        return value


def trained_tensors(model: nn.Module) -> dict[str, TrainedTensor]:
    """Return what training changes, by the names of the checkpoint: adapted tensors first, then other parameters.

    Args:
        model: the causal language model inside any LoRA wrapper.
    """
    found: dict[str, TrainedTensor] = {}
    covered: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, LoraLinear | LoraEmbedding | ParamWrapper):
            continue
        leaf = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
        base = module.get_base_layer().get_parameter(leaf)
        tensor = found.setdefault(f"{_plain(path)}.{leaf}", TrainedTensor(base))
        covered.add(id(base))
        for adapter in module.active_adapters:
            down, up = _factors(module, adapter)
            tensor.changes.append(_change(module, adapter, down, up))
            covered |= {id(down), id(up)}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in covered:
            found[_plain(path)] = TrainedTensor(parameter)
    return found


def _plain(path: str) -> str:
    """Return a name without PEFT's wrappers, which may be nested."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def _factors(module: LoraLinear | LoraEmbedding | ParamWrapper, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    if isinstance(module, LoraEmbedding):
        return module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    return module.lora_A[adapter].get_parameter("weight"), module.lora_B[adapter].get_parameter("weight")


def _change(
    module: LoraLinear | LoraEmbedding | ParamWrapper, adapter: str, down: nn.Parameter, up: nn.Parameter
) -> Callable[[], Tensor]:
    """Return the function that computes what an adapter adds to its tensor."""
    scaling = module.scaling[adapter]

    def change() -> Tensor:
        down_RI, up_OR = full(down).float(), full(up).float()
        if isinstance(module, LoraEmbedding):
            return scaling * (up_OR @ down_RI).T
        if isinstance(module, ParamWrapper) and module.get_param().ndim == 3:
            down_ERI = down_RI.reshape(module.num_experts, -1, down_RI.shape[-1])
            up_EOR = up_OR.reshape(up_OR.shape[0], -1, module.num_experts).permute(2, 0, 1)
            change_EOI = scaling * (up_EOR @ down_ERI)
            return change_EOI if module._did_swap_in_out_features else change_EOI.transpose(1, 2)
        return scaling * (up_OR @ down_RI)

    return change


def check_trained(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Check that the checkpoint has a tensor for everything that trains.

    Args:
        model: the causal language model inside any LoRA wrapper.
        checkpoint: the checkpoint of the child.

    Raises:
        ValueError: a parameter that trains belongs to no tensor, or to one of another shape; or an adapter is on a
            tensor that two modules share.
    """
    names = defaultdict(list)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(_plain(path))
    for name, tensor in trained_tensors(model).items():
        shared = sorted({*names[id(tensor.base)]} - {name})
        if shared and tensor.changes:
            raise ValueError(
                f"training.lora: {name} and {shared[0]} are one tensor in {checkpoint.folder} (tie_word_embeddings): "
                "merging an adapter of one would change both. Leave it out of lora.target_modules"
            )
        if name not in checkpoint.tensors:
            raise ValueError(
                f"training: {name} would train, but {checkpoint.folder} has no tensor of that name to save it in "
                "(quantized experts cannot be trained in place). Add it to `freeze`, or train an adapter elsewhere"
            )
        stored = checkpoint.tensors[name].shape
        if stored != tuple(tensor.base.shape):
            raise ValueError(
                f"training: {name} would train with shape {tuple(tensor.base.shape)}; {checkpoint.folder} has {stored}"
            )


def check_saved(folder: Path, settings: TrainingSettings) -> None:
    """Check, on a model without weights, that what trains will be saved. Randomness is left as it was.

    Args:
        folder: checkpoint folder of the child.
        settings: what trains.

    Raises:
        ValueError: settings of adapters or of `freeze` that do not fit the model, or the reasons of `check_trained`.
    """
    with RandomStream(torch.device("cpu")).fork():
        model = adapted(without_weights(folder, settings), settings)
    check_trained(without_adapters(model), Checkpoint(folder))
