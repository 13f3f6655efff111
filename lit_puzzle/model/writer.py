"""Writes a checkpoint tensor by tensor: safetensors with an index, in a folder that appears when it is complete.

Names, dtypes and shapes of all tensors are known in advance, so headers and offsets are computed first and every tensor
is written to its final place, in any order. Everything is synced to disk, then the scratch folder is renamed.

Bytes that are already stored in another file (`StoredRows`: a tensor, or some experts of it) are copied by the kernel
from file to file, where the file systems allow it. Values are checked before they are written
(`lit_puzzle.model.values`): no folder with a NaN or an infinity appears.

Memory: one tensor; for stored bytes at most `BUFFER_BYTES`. Disk: the sum of all tensors, checked before writing, and
twice that while an older folder of the same name is replaced. Traffic: every byte is read and written once; bytes that
have values to check (all but MXFP4 blocks) are read once more, from the page cache where they fit in it.

Source: the safetensors format and the index of Hugging Face's sharded checkpoints.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_puzzle.model.checkpoint import INDEX_FILE, SINGLE_FILE
from lit_puzzle.model.layout import Shape
from lit_puzzle.model.safetensors_file import DTYPE_CODES, DTYPES, TensorInfo
from lit_puzzle.model.values import check_computed, check_values, has_values
from lit_puzzle.run.files import write_json

Layout = Mapping[str, tuple[str, Shape]]  # full tensor name -> dtype code (`BF16`) and shape

MAX_SHARD_BYTES = 5_000_000_000
HEADER_ALIGNMENT = 64
BUFFER_BYTES = 1 << 24
# The kernel cannot copy between these two files (other file systems, an old kernel): read and write instead.
NOT_BY_KERNEL = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class StoredRows:
    """A tensor that is stored in a safetensors file, or rows of it.

    Attributes:
        info: the stored tensor.
        rows: indices of the first dimension, in the order in which they are taken; None takes the whole tensor.
    """

    info: TensorInfo
    rows: tuple[int, ...] | None = None

    @property
    def shape(self) -> Shape:
        """Shape of the tensor, or of its rows."""
        return self.info.shape if self.rows is None else (len(self.rows), *self.info.shape[1:])

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield the first byte in the file and the number of bytes of each run of neighboring rows."""
        if self.rows is None:
            yield self.info.begin, self.info.num_bytes
            return
        row_bytes = self.info.num_bytes // self.info.shape[0]
        for _, run in itertools.groupby(enumerate(self.rows), key=lambda pair: pair[1] - pair[0]):
            rows = [row for _, row in run]
            yield self.info.begin + rows[0] * row_bytes, len(rows) * row_bytes


@contextmanager
def atomic_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """Provide a scratch folder that becomes `target` when the block succeeds and is removed when it fails.

    Args:
        target: the folder to make.
        replace: whether an existing `target` is replaced, at the very end.

    Yields:
        The scratch folder, empty.

    Raises:
        ValueError: `target` exists and `replace` is false.
    """
    scratch, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    if old.exists() and not target.exists():  # killed between the two renames below
        old.rename(target)
    if target.exists() and not replace:
        raise ValueError(f"{target} already exists; remove it or choose another folder")
    for leftover in (scratch, old):  # of a process that was killed
        if leftover.exists():
            shutil.rmtree(leftover)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in [*scratch.rglob("*"), scratch]:
            _sync(path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if target.exists():
        target.rename(old)
    scratch.rename(target)
    _sync(target.parent)
    if old.exists():
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(
    folder: Path,
    layout: Layout,
    tensors: Iterable[tuple[str, Tensor | StoredRows]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    shard_done: Callable[[Path], None] | None = None,
) -> None:
    """Write the weights of a checkpoint into an existing folder.

    Args:
        folder: gets `model.safetensors`, or shards and an index if one file would be larger than `max_shard_bytes`.
        layout: all tensors of the checkpoint; their order determines which share a shard.
        tensors: full name and tensor (or its place in another file), each name of `layout` once, in any order.
        max_shard_bytes: size of the largest shard; a single tensor may be larger and is not split.
        shard_done: is called with each file when all of its bytes are written, possibly before they are synced.

    Raises:
        ValueError: a tensor is unknown, repeated, missing, or of another dtype or shape than in `layout`; a value is
            NaN or infinite; or the disk is too small.
    """
    sizes = {name: math.prod(shape) * DTYPES[code].itemsize for name, (code, shape) in layout.items()}
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if total > free:
        raise ValueError(
            f"{folder}: the weights need {total / 2**30:.2f} GiB, the disk has {free / 2**30:.2f} GiB free"
        )
    shards = _split(sizes, max_shard_bytes)
    files = [_file_name(number, len(shards)) for number in range(len(shards))]
    with ExitStack() as stack:
        places: dict[str, tuple[int, int]] = {}  # tensor name -> file descriptor, offset in the file
        for name, shard in zip(files, shards, strict=True):
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            stack.callback(os.close, descriptor)
            header, offsets = _header({key: layout[key] for key in shard}, sizes)
            _write(descriptor, memoryview(header), 0)
            places |= {key: (descriptor, offset) for key, offset in offsets.items()}
        left = {name: set(shard) for name, shard in zip(files, shards, strict=True)}
        for written in _write_tensors(layout, places, tensors):
            file = next(name for name, names in left.items() if written in names)
            left[file].remove(written)
            if not left[file] and shard_done is not None:
                shard_done(folder / file)
        for descriptor in sorted({descriptor for descriptor, _ in places.values()}):
            os.fsync(descriptor)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(files, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, index)


def _write_tensors(
    layout: Layout, places: Mapping[str, tuple[int, int]], tensors: Iterable[tuple[str, Tensor | StoredRows]]
) -> Iterator[str]:
    """Write the tensors to their places and yield the name of each."""
    open_names = set(layout)
    for name, tensor in tensors:
        if name not in open_names:
            raise ValueError(f"tensor {name} was {'already written' if name in layout else 'not expected'}")
        code = tensor.info.dtype if isinstance(tensor, StoredRows) else DTYPE_CODES.get(tensor.dtype)
        given = (code, tuple(tensor.shape))
        if given != layout[name]:
            raise ValueError(f"tensor {name} is {given[0]} {given[1]}, expected {layout[name][0]} {layout[name][1]}")
        if isinstance(tensor, StoredRows):
            _copy(name, tensor, *places[name])
        else:
            check_computed(name, tensor)
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            _write(places[name][0], data.data, places[name][1])
            del data
        del tensor  # else it stays while the next one is computed
        open_names.remove(name)
        yield name
    if open_names:
        raise ValueError(f"missing tensor(s): {sorted(open_names)}")


def _copy(name: str, stored: StoredRows, descriptor: int, offset: int) -> None:
    """Check stored bytes and copy them to their place in the new file."""
    source = os.open(stored.info.file, os.O_RDONLY)
    try:
        if sys.platform == "linux":
            os.posix_fadvise(source, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # reads further ahead, as cp does
        for begin, length in stored.runs():
            if has_values(name, stored.info.dtype):
                _check_run(name, stored.info, source, begin, length)
            _copy_run(source, begin, descriptor, offset, length)
            offset += length
            if sys.platform == "linux":  # pages that were read would push out those that are to be written and hashed
                os.posix_fadvise(source, begin, length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(source)


def _check_run(name: str, info: TensorInfo, source: int, begin: int, length: int) -> None:
    """Check the values of stored bytes, a buffer at a time."""
    buffer = bytearray(min(BUFFER_BYTES, length))  # a multiple of every dtype's size, as `length` is
    for done in range(0, length, BUFFER_BYTES):
        part = memoryview(buffer)[: length - done]
        filled = 0
        while filled < len(part):
            filled += _some(os.preadv(source, [part[filled:]], begin + done + filled))
        check_values(name, torch.frombuffer(part, dtype=DTYPES[info.dtype]), info.file)


def _copy_run(source: int, begin: int, target: int, offset: int, length: int) -> None:
    done = _copy_by_kernel(source, begin, target, offset, length) if sys.platform == "linux" else 0
    buffer = memoryview(bytearray(min(BUFFER_BYTES, length - done)))
    while done < length:
        copied = _some(os.preadv(source, [buffer[: length - done]], begin + done))
        _write(target, buffer[:copied], offset + done)
        done += copied


def _copy_by_kernel(source: int, begin: int, target: int, offset: int, length: int) -> int:
    """Copy by the kernel; return the number of bytes copied, fewer than `length` if the kernel refuses to go on."""
    done = 0
    try:
        while done < length:  # one call copies at most 2 GiB
            done += _some(os.copy_file_range(source, target, length - done, begin + done, offset + done))
    except OSError as error:
        if error.errno not in NOT_BY_KERNEL:
            raise
    return done


def _some(num_bytes: int) -> int:
    if num_bytes == 0:
        raise ValueError("a weight file became shorter while it was copied; copy or download it again")
    return num_bytes


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:  # one call writes at most 2 GiB
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _split(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Return the names of each shard, in order; a new shard begins where the current one would become too large."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _file_name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _header(shard: Layout, sizes: Mapping[str, int]) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file and each tensor's offset in it; wide dtypes first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    position = 0
    for name in sorted(shard, key=lambda key: -DTYPES[shard[key][0]].itemsize):
        begins[name] = position
        position += sizes[name]
        code, shape = shard[name]
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begins[name], position]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + begin for name, begin in begins.items()}
