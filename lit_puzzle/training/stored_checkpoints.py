"""Reads training checkpoints without running code of theirs: only tensors, numbers and texts come out of the files.

A sharded checkpoint (`torch.distributed.checkpoint`) has a `.metadata` file that PyTorch unpickles without limits, and
settings of the optimizer in its `*.distcp` files that it unpickles too. Here both are limited: the first to the classes
of that format (`METADATA_CLASSES`), the second to what `torch.load(weights_only=True)` allows.

Reads `*.ckpt` folders and files; writes nothing. Traffic: `check_checkpoint` reads every byte once, for its checksum.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

METADATA = "meta.pt"  # everything that is not sharded; written last
FORMAT = "torch.distributed.checkpoint."
METADATA_CLASSES = {
    **dict.fromkeys(
        ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        FORMAT + "metadata",
    ),
    **dict.fromkeys(("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"), FORMAT + "metadata"),
    **dict.fromkeys(("_StorageInfo", "_StoragePrefix"), FORMAT + "filesystem"),
    **dict.fromkeys(("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"), "pathlib"),
    "Size": "torch",
    "_get_layout": "torch.serialization",
    "OrderedDict": "collections",
}
DAMAGE = (  # what readers raise on damaged bytes
    *(pickle.UnpicklingError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, ValueError, TypeError),
    *(KeyError, IndexError, AttributeError, ImportError, OverflowError, MemoryError, AssertionError),
)


def _memory_format(encoding: object, name: str) -> _MEM_FORMAT_ENCODING:
    """Return a member of the one enumeration of the format: early releases of Python 3.11 write it by `getattr`."""
    if encoding is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"it takes {name} from {encoding}, which no checkpoint needs; it was not loaded")
    return _MEM_FORMAT_ENCODING[name]


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles nothing but the metadata of a sharded checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not is_dtype and METADATA_CLASSES.get(name) != module:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs; it was not loaded")
        return super().find_class(module, name)


class CheckpointReader(FileSystemReader):
    """PyTorch's reader of sharded checkpoints, with limited unpickling."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the checkpoint contains.

        Raises:
            ValueError: the file is damaged, or names other classes than those of the format.
        """
        path = Path(self.path) / ".metadata"
        with _damage(path):
            metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f"it contains {type(metadata).__name__}")
            if metadata.storage_meta is None:
                metadata.storage_meta = StorageMeta()
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    """PyTorch's plan of loading, with limited unpickling of what is no tensor."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), plain)  # refuses anything but plain values
        plain.seek(0)
        super().load_bytes(read_item, plain)


def load_sharded(state: dict[str, Any], folder: Path) -> None:
    """Load a sharded checkpoint of any number of processes into the tensors of `state`, in place.

    Raises:
        ValueError: the checkpoint is damaged or contains other objects than tensors and plain values.
    """
    try:
        dcp.load(state, storage_reader=CheckpointReader(folder), planner=_Planner())
    except CheckpointException as error:  # what each process that failed has raised
        _, (reason, _) = next(iter(sorted(error.failures.items())))
        raise ValueError(_message(folder, reason)) from error


def load_plain(path: Path, mapped: bool = False) -> Any:
    """Return the content of a file of `torch.save`.

    Args:
        path: the file.
        mapped: whether tensors stay views of the file.

    Raises:
        ValueError: the file is damaged or contains other objects than tensors and plain values.
    """
    with _damage(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def check_checkpoint(path: Path) -> None:
    """Check that a run can resume from a checkpoint: all of it is there, undamaged, and free of code.

    Args:
        path: a sharded checkpoint (a folder), or a file of another strategy.

    Raises:
        ValueError: it is incomplete or damaged; the message names the file.
    """
    if not path.is_dir():
        with _damage(path), zipfile.ZipFile(path) as archive:
            _check_sums(archive)
        load_plain(path, mapped=True)
        return
    if not (path / METADATA).is_file():
        raise ValueError(f"{path} is not a complete training checkpoint: {METADATA}, which is written last, is missing")
    load_plain(path / METADATA)
    for file, pieces in _pieces(path).items():
        with _damage(file), file.open("rb") as stream:
            for offset, length in pieces:
                stream.seek(offset)
                content = stream.read(length)
                if len(content) != length:
                    raise EOFError(f"it ends at byte {offset + len(content)}, expected {offset + length}")
                with zipfile.ZipFile(io.BytesIO(content)) as archive:
                    _check_sums(archive)


def _pieces(folder: Path) -> dict[Path, list[tuple[int, int]]]:
    """Return offset and length of every piece of the files of a sharded checkpoint."""
    found: dict[Path, list[tuple[int, int]]] = {}
    for info in CheckpointReader(folder).read_metadata().storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{folder / '.metadata'} names the file {info.relative_path!r}, outside of its folder")
        found.setdefault(folder / info.relative_path, []).append((info.offset, info.length))
    return {file: sorted(pieces) for file, pieces in found.items()}


def _check_sums(archive: zipfile.ZipFile) -> None:
    broken = archive.testzip()
    if broken is not None:
        raise zipfile.BadZipFile(f"the checksum of {broken} is wrong")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what readers raise on damaged files into one error that names the file."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(_message(path, error)) from error


def _message(path: Path, error: BaseException) -> str:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return f"{path} cannot be loaded as part of a training checkpoint: {said}"
