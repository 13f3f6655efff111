"""Files of trained layers, which a run that reads its parent layer by layer keeps until the last layer is trained.

Reads and writes `trained.LAYER`: a safetensors file of the trained tensors of a layer's blocks, the (N, C) losses of
its N updates and the losses of its validations; its metadata has a hash of all of them. A file that is not as it was
written counts as missing. Memory: one file. Shapes: C blocks, N updates.
"""

from collections.abc import Mapping
from functools import cache
from hashlib import blake2b
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

LOSSES, VALIDATED = "losses", "validated"
HASH = "blake2b"


def write_kept(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the file of a layer, whole or not at all."""
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(f"{path.name}.partial")
    save_file(whole, partial, {HASH: _hash(whole)})
    partial.rename(path)


def kept_updates(path: Path) -> int | None:
    """Return for how many updates the blocks of a layer were trained; None where its file is missing or damaged."""
    if not path.is_file():
        return None
    state = path.stat()
    return _updates(path, state.st_size, state.st_mtime_ns)


@cache  # of files as they are: each is read once in a process
def _updates(path: Path, size: int, modified: int) -> int | None:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            if (file.metadata() or {}).get(HASH) == _hash(tensors):
                return len(tensors[LOSSES])
            why = "its values are not those that were written"
    except SafetensorError as error:
        why = str(error)
    print(f"warning: {path} is damaged ({why}); its layer is trained again", flush=True)
    return None


def check_updates(path: Path, layer: int, updates: int) -> None:
    """Check that what a run has kept of a layer was trained for as many updates as the run has now.

    Raises:
        ValueError: it was trained for more or fewer.
    """
    kept = kept_updates(path)
    if kept is not None and kept != updates:
        raise ValueError(
            f"trainer.max_steps={updates} was given; the blocks of layer {layer} of this run have trained for {kept} "
            f"updates and keep no optimizer to go on with. Go on with --trainer.max_steps={kept}, or train all layers "
            "anew with --overwrite."
        )


def _hash(tensors: Mapping[str, Tensor]) -> str:
    found = blake2b()
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        found.update(tensors[name].reshape(-1).view(uint8).numpy().data)
    return found.hexdigest()
