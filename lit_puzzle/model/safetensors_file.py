"""A safetensors file, memory-mapped, whose size is checked against its header to the byte.

Reads the JSON header (8 bytes of length, then the header, then data without gaps) and returns tensors as views of the
mapped file. Reading and writing whole folders: `lit_puzzle.model.checkpoint` and `lit_puzzle.model.writer`.

Memory: the header, about 150 bytes per tensor. Views are private maps: their bytes come from the page cache when they
are read, no anonymous memory is allocated, and a slice of rows reads only its rows.

Source: the safetensors format.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_puzzle.model.layout import Shape
from lit_puzzle.model.values import check_values
from lit_puzzle.run.files import check_regular, parse_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a safetensors header: dtype code (`BF16`), shape, file and offset."""

    dtype: str
    shape: Shape
    file: Path
    begin: int  # of the first byte in the file

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file and check it against the file's size.

    Raises:
        ValueError: the file is not a safetensors file, or the bytes of a tensor are missing.
    """
    check_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(
                f"{path} is truncated or not a safetensors file: it has {size} bytes, its header should have {length}"
            )
        raw = file.read(length)
    try:
        header = parse_json(raw, f"{path}: the safetensors header")
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        infos = {name: _tensor_info(path, name, entry, 8 + length, size) for name, entry in entries.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the safetensors header is damaged: {error!r}") from error
    _check_covered(path, infos, 8 + length, size)
    return infos


def _tensor_info(path: Path, name: str, entry: Mapping[str, Any], data_begin: int, size: int) -> TensorInfo:
    if str(entry["dtype"]) not in DTYPES:
        raise ValueError(f"{path}: {name} has dtype {entry['dtype']}; allowed: {sorted(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (_wholes(shape) and len(shape) <= MAX_DIMENSIONS and _wholes(offsets) and len(offsets) == 2):
        raise ValueError(
            f"{path}: the safetensors header has the shape {str(shape)[:80]} and the data_offsets {str(offsets)[:80]} "
            f"for {name}; a list of whole numbers, and two of them, are needed"
        )
    begin, end = (data_begin + offset for offset in offsets)
    info = TensorInfo(entry["dtype"], tuple(shape), path, begin)
    if end - begin != info.num_bytes or begin < data_begin:
        raise ValueError(
            f"{path}: {name} of shape {info.shape} needs {info.num_bytes} bytes, the header gives {end - begin}"
        )
    if end > size:
        raise ValueError(
            f"{path} is truncated: {name} ends at byte {end}, the file at {size}; copy or download it again"
        )
    return info


def _wholes(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _check_covered(path: Path, infos: Mapping[str, TensorInfo], begin: int, size: int) -> None:
    """Refuse gaps and overlaps, which the format forbids: the file was not written completely."""
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].num_bytes)):
        if info.begin != begin:
            raise ValueError(
                f"{path}: {name} begins at byte {info.begin}, expected {begin}: gap or overlap in the file"
            )
        begin += info.num_bytes
    if begin != size:
        raise ValueError(
            f"{path}: tensors end at byte {begin}, the file at {size}: the file was not written to its end"
        )


class SafetensorsFile:
    """A mapped safetensors file.

    Args:
        path: of the file.

    Attributes:
        tensors: entries of its header by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = read_header(path)
        self._checked: set[str] = set()
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def read(self, name: str) -> Tensor:
        """Return a tensor as `view` does, after checking its values when it is read for the first time.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        tensor = self.view(name)
        if name not in self._checked:
            check_values(name, tensor, self.path)
            self._checked.add(name)
        return tensor

    def view(self, name: str) -> Tensor:
        """Return a tensor as a view of the file, which must not be written to; copied only where not aligned."""
        info = self.tensors[name]
        dtype = DTYPES[info.dtype]
        if info.num_bytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        raw = torch.frombuffer(self._bytes, dtype=torch.uint8, count=info.num_bytes, offset=info.begin)
        aligned = raw if info.begin % dtype.itemsize == 0 else raw.clone()
        return aligned.view(dtype).view(info.shape)

    def read_ahead(self, name: str) -> None:
        """Let the kernel read a tensor into the page cache while something else is done (Linux only)."""
        info = self.tensors[name]
        if sys.platform == "linux" and info.num_bytes:
            begin = info.begin - info.begin % mmap.PAGESIZE
            self._bytes.madvise(mmap.MADV_WILLNEED, begin, info.begin + info.num_bytes - begin)

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor as stored."""
        info = self.tensors[name]
        return memoryview(self._bytes)[info.begin : info.begin + info.num_bytes]
