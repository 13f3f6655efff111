"""What an exported folder holds, tensor by tensor: where its bytes lie, or how they are made when their turn comes.

A step of the export is a function from `Weights` to `Weights`. Nothing is read before a tensor is written, and what
no step has touched stays `StoredRows`: copied from file to file.

Reads: headers; tensors as views of mapped files. Writes nothing. Memory: about 1 KB a tensor, and the one at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import KV_SCALES, Shape, layer_prefix
from lit_puzzle.model.safetensors_file import DTYPE_CODES, DTYPES
from lit_puzzle.model.writer import Layout, StoredRows


@dataclass(frozen=True)
class Weight:
    """One tensor to be written.

    Attributes:
        dtype: Code of the safetensors format (`BF16`).
        shape: Its shape.
        read: Makes the tensor, or a view of it.
        stored: Where exactly these bytes lie in a file; None when they have to be made.
    """

    dtype: str
    shape: Shape
    read: Callable[[], Tensor]
    stored: StoredRows | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


Weights = dict[str, Weight]  # full tensor name -> where it comes from


def stored_weights(checkpoint: Checkpoint) -> Weights:
    """Everything that a checkpoint holds, as it lies there."""
    return {
        name: Weight(info.dtype, info.shape, lambda name=name: checkpoint.read(name), StoredRows(info))  # type: ignore[misc]
        for name, info in checkpoint.tensors.items()
    }


def of_tensor(tensor: Tensor) -> Weight:
    """A small tensor that is already there."""
    return Weight(DTYPE_CODES[tensor.dtype], tuple(tensor.shape), lambda: tensor)


def converted(name: str, weight: Weight, dtype: torch.dtype) -> Weight:
    """The same values, rounded to another dtype; the very same weight when it has that dtype.

    Raises:
        ValueError: When read: a value is too large for the dtype, or was not finite before.
    """
    code = DTYPE_CODES[dtype]
    if weight.dtype == code:
        return weight

    def read() -> Tensor:
        rounded = weight.read().to(dtype)
        if not torch.stack(rounded.aminmax()).isfinite().all():  # without another copy of the tensor
            raise ValueError(f"{name} has values that {dtype} cannot hold; export with another dtype")
        return rounded

    return replace(weight, dtype=code, read=read, stored=None)


def in_dtype(weights: Weights, dtype: torch.dtype) -> Weights:
    """All floating-point tensors in one dtype; packed experts and KV scales stay what they are."""
    return {
        name: weight if weight.dtype == "U8" or name.endswith(KV_SCALES) else converted(name, weight, dtype)
        for name, weight in weights.items()
    }


def with_kv_scales(weights: Weights, scales: Mapping[str, Tensor]) -> Weights:
    """The weights with these KV scales, by full name, in the place of whatever scales there were."""
    kept = without_kv_scales(weights)
    return kept | {name: of_tensor(tensor) for name, tensor in scales.items()}


def without_kv_scales(weights: Weights) -> Weights:
    """The weights without KV scales."""
    return {name: weight for name, weight in weights.items() if not name.endswith(KV_SCALES)}


def mxfp4_layers(weights: Weights, num_layers: int) -> frozenset[int]:
    """Layers whose experts are packed."""
    return frozenset(
        layer for layer in range(num_layers) if f"{layer_prefix(layer)}mlp.experts.down_proj_blocks" in weights
    )


def layout_of(weights: Weights) -> Layout:
    """Names, dtypes and shapes, as the writer wants them."""
    return {name: (weight.dtype, weight.shape) for name, weight in weights.items()}


def handed_over(weights: Weights) -> Iterator[tuple[str, Tensor | StoredRows]]:
    """One tensor after the other, made when it is asked for."""
    for name, weight in weights.items():
        yield name, weight.read() if weight.stored is None else weight.stored
