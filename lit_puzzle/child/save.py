"""A trained child as a folder: the folder of the child that was trained, with its trained tensors replaced.

Every file without weights is copied unchanged (config, modeling file, tokenizer, chat template, generation lengths);
every tensor that was not trained is copied byte for byte (MXFP4 experts included); a trained one is cast to the dtype
that it had, LoRA merged (`lit_puzzle.child.trained`). What is measured afterwards is this folder, loaded again.

Reads the folder of the child that was trained. Writes the folder of the trained child, whole or not at all.
Memory: one full tensor, and the change of its adapter in float32.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from lit_puzzle.child.trained import check_trained, trained_tensors
from lit_puzzle.model.checkpoint import INDEX_FILE, PICKLE_SUFFIXES, Checkpoint, weight_files
from lit_puzzle.model.identity import weights_identity
from lit_puzzle.model.safetensors_file import DTYPES
from lit_puzzle.model.writer import StoredRows, atomic_folder, write_checkpoint
from lit_puzzle.run.checksums import CHECKSUMS
from lit_puzzle.run.inputs import record_output


def save_child(source: Path, target: Path, model: nn.Module, is_writer: bool) -> None:
    """Write `target` from `source` and the trained tensors of `model`; an existing `target` is replaced.

    The run folder, which `target` is in, records the identity of the written weights.

    Args:
        source: folder of the child that was trained.
        target: folder to write.
        model: the trained causal language model inside any LoRA wrapper. Every process calls this, with its shards.
        is_writer: whether this process writes (rank 0).

    Raises:
        ValueError: a trained tensor that the source folder does not have, or one with values that are not finite in
            the dtype of the folder.
    """
    if not is_writer:
        for tensor in trained_tensors(model).values():
            tensor.value()
        return
    checkpoint = Checkpoint(source)
    checkpoint.check_checksums()
    check_trained(model, checkpoint)
    weights = {path.name for path in weight_files(source)} | {INDEX_FILE, CHECKSUMS}
    with atomic_folder(target, replace=True) as scratch:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in weights and path.suffix not in PICKLE_SUFFIXES:
                shutil.copy2(path, scratch / path.name)
        layout = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
        write_checkpoint(scratch, layout, _with_trained(checkpoint, model))
    record_output(target.parent, target.name, weights_identity(target))


def _with_trained(checkpoint: Checkpoint, model: nn.Module) -> Iterator[tuple[str, Tensor | StoredRows]]:
    """Yield every tensor of a checkpoint: the trained ones first, then where the bytes of the others are stored."""
    trained = trained_tensors(model)
    for name, tensor in trained.items():
        rounded = tensor.value().to(DTYPES[checkpoint.tensors[name].dtype])
        if not rounded.isfinite().all():
            raise ValueError(
                f"{name} has trained values that are not finite in {rounded.dtype}, the dtype of {checkpoint.folder}; "
                "nothing was saved. Train with a lower learning rate"
            )
        yield name, rounded
    for name, info in checkpoint.tensors.items():
        if name not in trained:
            yield name, StoredRows(info)
