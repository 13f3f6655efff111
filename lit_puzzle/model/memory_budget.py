"""The memory that a model needs when its layers are read from disk one at a time, checked against a budget.

A budget (`memory_gib` in recipes) bounds what a stage holds at once: on a CPU the anonymous memory of the process, on a
GPU what is allocated there. Mapped files (weights in the dtype they are stored in, hidden states) do not count: the
kernel drops their pages when memory is short.

    process      what is allocated already: Python and its libraries on a CPU
    outside      embedding, last norm and head, where they are converted or on a GPU
    layer        the largest decoder layer
    converting   the buffers of one expert that is dequantized
    computing    activations, as the stage states them

needed = process + outside + layer + converting + computing. With another `layer + converting` the next layer is
converted while this one computes; without, its file is read ahead only. Reads /proc/self/status; writes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import family_of
from lit_puzzle.model.layout import MXFP4_BLOCK, layer_prefix, layer_shapes, whole
from lit_puzzle.model.safetensors_file import DTYPES

GIB = 2**30
STATUS = Path("/proc/self/status")
CONVERTING_BYTES_PER_BLOCK_BYTE = 12  # `lit_puzzle.model.mxfp4`: index, looked-up values, scales, and the pages around
TEMPORARIES = 1.25  # buffers of the layer's arithmetic that live beside those counted below


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs at once, see the top of the file."""

    process: int
    outside: int
    layer: int
    converting: int
    computing: int

    @property
    def smallest(self) -> int:
        """Bytes with one layer in memory."""
        return self.process + self.outside + self.layer + self.converting + self.computing

    @property
    def ahead(self) -> int:
        """Bytes with the next layer in memory besides."""
        return self.smallest + self.layer + self.converting

    def describe(self) -> str:
        """Return the parts in GiB for a message."""
        names = ("process", "outside", "layer", "converting", "computing")
        return ", ".join(f"{name} {vars(self)[name] / GIB:.2f}" for name in names)


def check_budget(memory_gib: float, need: Need, folder: Path) -> bool:
    """Return whether the next layer may be in memory while one computes.

    Raises:
        ValueError: the budget is not positive, or smaller than what one layer needs; names the number needed.
    """
    if not 0 < memory_gib < math.inf:
        raise ValueError(
            f"memory_gib={memory_gib} was given; it is above 0, or null to keep the whole model in memory."
        )
    if memory_gib * GIB < need.smallest:
        needed = math.ceil(need.smallest / GIB * 100) / 100
        raise ValueError(
            f"memory_gib={memory_gib:g} was given; {folder} needs at least {needed:.2f} GiB with one layer in memory "
            f"({need.describe()} GiB). Raise memory_gib, or make batches smaller."
        )
    return memory_gib * GIB >= need.ahead


def streaming_need(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, outside: int = 0, computing: int = 0
) -> Need:
    """Return what a checkpoint needs.

    Args:
        checkpoint: the model.
        dtype: of its weights in memory.
        device: where it computes.
        outside: bytes of what is loaded outside the layers, if it is not loaded yet.
        computing: bytes of activations of the stage.
    """
    layers, converting = [], 0
    for layer, (experts, _) in enumerate(checkpoint.blocks):
        shapes = layer_shapes(checkpoint.config, experts, mxfp4=False)
        layers.append(dtype.itemsize * sum(math.prod(shape) for shape in shapes.values()))
        for name in family_of(checkpoint.config).layer.expert_tensors:
            stored = checkpoint.tensors.get(layer_prefix(layer) + name)
            if name.endswith("_blocks") and stored is not None:
                converting = max(converting, CONVERTING_BYTES_PER_BLOCK_BYTE * math.prod(stored.shape[1:]))
    return Need(allocated_bytes(device), outside, max(layers), converting, computing)


def outside_bytes(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, head: bool) -> int:
    """Return the bytes of embedding, last norm and head in memory: none on a CPU in the dtype that is stored."""
    total = 0
    for name, info in checkpoint.tensors.items():
        used = not name.startswith("model.layers.") and (head or not name.startswith("lm_head."))
        if used and (device.type != "cpu" or DTYPES[info.dtype] != dtype):
            total += math.prod(info.shape) * dtype.itemsize
    return total


def allocated_bytes(device: torch.device) -> int:
    """Return the anonymous memory of this process (0 where the system does not tell), or what a GPU has allocated."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def layer_bytes(checkpoint: Checkpoint, tokens: int, row_tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of the activations of one layer's forward pass without gradients.

    Args:
        checkpoint: the model.
        tokens: tokens of the batch, padding included.
        row_tokens: tokens of its longest row.
        dtype: of the arithmetic.
    """
    config, keys = checkpoint.config, family_of(checkpoint.config).config
    hidden, width = whole(config, "hidden_size"), whole(config, keys.expert_width)
    heads, kv_heads = whole(config, "num_attention_heads"), whole(config, "num_key_value_heads")
    channels = config.get("head_dim") or hidden // heads
    chosen = whole(config, keys.experts_per_token)
    attention = channels * (5 * heads + 4 * kv_heads)  # queries, keys, values: projected, rotated, padded; the output
    experts = chosen * (2 * hidden + 4 * width)  # of every choice: input, output, gate and up, their product
    per_token = dtype.itemsize * (5 * hidden + max(attention, experts))
    return int(TEMPORARIES * tokens * (per_token + 2 * row_tokens // MXFP4_BLOCK))
