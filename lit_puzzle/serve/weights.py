"""The weights of an exported folder: for each tensor, where its bytes are stored or how it is computed.

A step of the export is a function from `Weights` to `Weights`. A tensor is read only when it is written; a tensor that
no step changes stays `StoredRows` and is copied from file to file.

Reads headers, and tensors as views of mapped files. Writes nothing. Memory: about 1 KB for each tensor, and the tensor
that is being written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import LayerNames
from lit_puzzle.model.layout import Shape, layer_prefix
from lit_puzzle.model.safetensors_file import DTYPE_CODES, DTYPES
from lit_puzzle.model.writer import Layout, StoredRows


@dataclass(frozen=True)
class Weight:
    """One tensor to be written.

    Attributes:
        dtype: code of the safetensors format (`BF16`).
        shape: shape of the tensor.
        read: returns the tensor, or a view of it.
        stored: where the bytes are stored; None if the tensor is computed.
    """

    dtype: str
    shape: Shape
    read: Callable[[], Tensor]
    stored: StoredRows | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


Weights = dict[str, Weight]  # by full tensor name


def stored_weights(checkpoint: Checkpoint) -> Weights:
    """Return all tensors of a checkpoint, as they are stored, after comparing its files with their checksums.

    Raises:
        ValueError: a weight file does not match SHA256SUMS.
    """
    checkpoint.check_checksums()
    return {
        name: Weight(info.dtype, info.shape, lambda name=name: checkpoint.read(name), StoredRows(info))  # type: ignore[misc]
        for name, info in checkpoint.tensors.items()
    }


def in_memory(tensor: Tensor) -> Weight:
    """Return the weight for a small tensor in memory."""
    return Weight(DTYPE_CODES[tensor.dtype], tuple(tensor.shape), lambda: tensor)


def converted(name: str, weight: Weight, dtype: torch.dtype) -> Weight:
    """Return a weight rounded to a dtype; the same object if it has that dtype.

    Raises:
        ValueError: when read: a value is too large for the dtype, or not finite.
    """
    code = DTYPE_CODES[dtype]
    if weight.dtype == code:
        return weight

    def read() -> Tensor:
        rounded = weight.read().to(dtype)
        if not torch.stack(rounded.aminmax()).isfinite().all():  # aminmax makes no copy of the tensor
            raise ValueError(f"{name} has values that {dtype} cannot hold; export with another dtype")
        return rounded

    return replace(weight, dtype=code, read=read, stored=None)


def in_dtype(weights: Weights, dtype: torch.dtype, names: LayerNames) -> Weights:
    """Return the weights with all tensors in one dtype; packed experts and KV scales stay unchanged."""
    return {
        name: weight if weight.dtype == "U8" or name.endswith(names.kv_scales) else converted(name, weight, dtype)
        for name, weight in weights.items()
    }


def with_kv_scales(weights: Weights, scales: Mapping[str, Tensor], names: LayerNames) -> Weights:
    """Return the weights with these KV scales, by full name, instead of any they had."""
    kept = without_kv_scales(weights, names)
    return kept | {name: in_memory(tensor) for name, tensor in scales.items()}


def without_kv_scales(weights: Weights, names: LayerNames) -> Weights:
    """Return the weights without KV scales."""
    return {name: weight for name, weight in weights.items() if not name.endswith(names.kv_scales)}


def mxfp4_layers(weights: Weights, num_layers: int, names: LayerNames) -> frozenset[int]:
    """Return the layers whose experts are packed."""
    packed = [f"{names.experts}.{matrix}_blocks" for matrix in names.expert_matrices]
    return frozenset(
        layer for layer in range(num_layers) if any(f"{layer_prefix(layer)}{name}" in weights for name in packed)
    )


def layout_of(weights: Weights) -> Layout:
    """Return names, dtypes and shapes, as the writer expects them."""
    return {name: (weight.dtype, weight.shape) for name, weight in weights.items()}


def stream(weights: Weights) -> Iterator[tuple[str, Tensor | StoredRows]]:
    """Yield one tensor after the other; each is computed when it is requested."""
    for name, weight in weights.items():
        yield name, weight.read() if weight.stored is None else weight.stored
