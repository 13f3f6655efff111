"""The recovered child as a folder: the child it came from, with the trained tensors exchanged.

Every file that holds no weights is copied as it is (config, modeling file, tokenizer, chat template, lengths); every
tensor that was not trained is copied byte for byte (MXFP4 experts included); a trained one is cast to the dtype it had.
LoRA is merged on the way: W + (alpha / rank) B A, in float32.

Reads: the input child's folder. Writes: the recovered child's folder, whole or not at all. Memory: one full tensor.
Source: LoRA, arXiv 2106.09685, section 4.1.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import LightningModule
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_puzzle.model.checkpoint import Checkpoint, weight_files
from lit_puzzle.model.writer import StoredRows, atomic_folder, write_checkpoint
from lit_puzzle.training.checkpoints import BestCheckpoint
from lit_puzzle.training.sharding import full, load_trainable


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors of what training changed; on sharded models every rank must iterate.

    Args:
        model: the causal language model inside any LoRA wrapper: its names are those of the checkpoint.
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


def save_child(source: Path, target: Path, model: nn.Module, is_writer: bool) -> None:
    """Writes `target` from `source` and the trained tensors of `model`; replaces a `target` that is there.

    Args:
        source: folder of the child that was trained.
        target: folder to write.
        model: the trained model (every rank calls this with its part).
        is_writer: whether this process writes (rank 0).

    Raises:
        ValueError: a trained tensor that the source folder does not have.
    """
    if not is_writer:
        for _ in trained_tensors(model):
            pass
        return
    checkpoint = Checkpoint(source)
    weights = {path.name for path in weight_files(source)} | {"model.safetensors.index.json"}
    with atomic_folder(target, replace=True) as scratch:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in weights:
                shutil.copy2(path, scratch / path.name)
        layout = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
        write_checkpoint(scratch, layout, _exchanged(checkpoint, model))


def _exchanged(checkpoint: Checkpoint, model: nn.Module) -> Iterator[tuple[str, Tensor | StoredRows]]:
    written = set()
    for name, tensor in trained_tensors(model):
        if name not in checkpoint.tensors:
            raise ValueError(
                f"{name} was trained, but {checkpoint.folder} has no tensor of that name to exchange "
                "(quantized experts cannot be trained in place). Add it to `freeze`."
            )
        written.add(name)
        yield name, tensor.to(checkpoint.read(name).dtype)
    for name, info in checkpoint.tensors.items():
        if name not in written:
            yield name, StoredRows(info)


def load_best(module: LightningModule) -> None:
    """Puts the best validated weights back; without `BestCheckpoint` or a validation the last ones stay.

    Raises:
        ValueError: they are no longer on disk.
    """
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, BestCheckpoint) or not callback.best_model_path:
            continue
        best = Path(callback.best_model_path)
        if not best.exists():
            raise ValueError(
                f"The best weights {best} ({callback.monitor} = {callback.best_score}) are gone; they must stay until "
                "the run is complete. Start again with --overwrite."
            )
        load_trainable(module, best)


def become_saved(model: nn.Module, source: Path) -> None:
    """Gives a trained model, in place, the values that `save_child` writes; it is not trained any further.

    Each trained tensor is rounded to the dtype that it has in `source`; LoRA is merged and then set to zero.

    Args:
        model: the causal language model inside any LoRA wrapper (every process calls this with its part).
        source: folder of the child that was trained.
    """
    stored = Checkpoint(source)
    parameters = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    for name, whole in trained_tensors(model):
        target = parameters[name].data
        rounded = whole.to(stored.read(name).dtype).to(target.dtype)
        if isinstance(target, DTensor):
            rounded = distribute_tensor(rounded, target.device_mesh, target.placements)
        target.copy_(rounded)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            for up in module.lora_B.values():
                up.weight.data.zero_()
