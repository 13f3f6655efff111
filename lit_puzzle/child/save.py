"""A trained child as a folder: the folder of the child that was trained, with its trained tensors replaced.

- `save_child` writes the folder. Every file without weights is copied unchanged (config, modeling file, tokenizer, chat
  template, generation lengths); every tensor that was not trained is copied byte for byte (MXFP4 experts included); a
  trained one is cast to the dtype that it had.
- `become_saved` gives the model in memory the same values, so that what is evaluated is what was saved.

LoRA is merged in both: W + (alpha / rank) B A, in float32.

Reads the folder of the child that was trained. Writes the folder of the trained child, whole or not at all.
Memory: one full tensor. Source: LoRA, arXiv 2106.09685, section 4.1.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_puzzle.model.checkpoint import INDEX_FILE, PICKLE_SUFFIXES, Checkpoint, weight_files
from lit_puzzle.model.safetensors_file import DTYPES
from lit_puzzle.model.writer import StoredRows, atomic_folder, write_checkpoint
from lit_puzzle.run.checksums import CHECKSUMS
from lit_puzzle.training.sharding import full


def save_child(source: Path, target: Path, model: nn.Module, is_writer: bool) -> None:
    """Write `target` from `source` and the trained tensors of `model`; an existing `target` is replaced.

    Args:
        source: folder of the child that was trained.
        target: folder to write.
        model: the trained causal language model inside any LoRA wrapper. Every process calls this, with its shards.
        is_writer: whether this process writes (rank 0).

    Raises:
        ValueError: a trained tensor that the source folder does not have.
    """
    if not is_writer:
        for _ in trained_weights(model):
            pass
        return
    checkpoint = Checkpoint(source)
    checkpoint.check_checksums()
    weights = {path.name for path in weight_files(source)} | {INDEX_FILE, CHECKSUMS}
    with atomic_folder(target, replace=True) as scratch:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in weights and path.suffix not in PICKLE_SUFFIXES:
                shutil.copy2(path, scratch / path.name)
        layout = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
        write_checkpoint(scratch, layout, _with_trained(checkpoint, model))


def _with_trained(checkpoint: Checkpoint, model: nn.Module) -> Iterator[tuple[str, Tensor | StoredRows]]:
    """Yield every tensor of a checkpoint: the trained ones first, then where the bytes of the others are stored."""
    trained = set()
    for name, tensor in trained_weights(model):
        if name not in checkpoint.tensors:
            raise ValueError(
                f"{name} was trained, but {checkpoint.folder} has no tensor of that name to replace "
                "(quantized experts cannot be trained in place). Add it to `freeze`."
            )
        trained.add(name)
        yield name, tensor.to(DTYPES[checkpoint.tensors[name].dtype])
    for name, info in checkpoint.tensors.items():
        if name not in trained:
            yield name, StoredRows(info)


def become_saved(model: nn.Module, source: Path) -> None:
    """Set a trained model, in place, to the values that `save_child` writes; it cannot be trained any further.

    Each trained tensor is rounded to the dtype that it has in `source`; LoRA is merged and then set to zero.

    Args:
        model: the trained causal language model inside any LoRA wrapper. Every process calls this, with its shards.
        source: folder of the child that was trained.
    """
    stored = Checkpoint(source).tensors
    parameters = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    for name, whole in trained_weights(model):
        target = parameters[name].data
        rounded = whole.to(DTYPES[stored[name].dtype]).to(target.dtype)
        if isinstance(target, DTensor):
            rounded = distribute_tensor(rounded, target.device_mesh, target.placements)
        target.copy_(rounded)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            for up in module.lora_B.values():
                up.weight.data.zero_()


def trained_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and whole tensor of every weight that training changed, LoRA merged.

    Args:
        model: the causal language model inside any LoRA wrapper: its names are those of the checkpoint. When it is
            sharded, every process must iterate to the end.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    for name, module in adapted.items():
        merged = full(module.base_layer.weight).float()
        for adapter in module.active_adapters:
            down, up = full(module.lora_A[adapter].weight).float(), full(module.lora_B[adapter].weight).float()
            merged = merged + module.scaling[adapter] * (up @ down)
        yield f"{name}.weight", merged.detach()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            yield name.replace(".base_layer.", "."), full(parameter).detach()
