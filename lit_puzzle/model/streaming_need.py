"""Bytes of a model whose layers are read from disk one at a time: what its budget is checked against, and `--plan`.

    process      what is allocated already: Python and its libraries on a CPU
    outside      embedding, last norm and head, where they are converted or on a GPU
    layer        the largest decoder layer
    converting   the buffers of one expert that is dequantized
    computing    activations: of a layer's forward pass, and what the stage states besides

needed = process + outside + layer + converting + computing. With another `layer + converting` the next layer is
converted while this one computes; without, its file is read ahead only. Pure functions; imports no torch; reads and
writes nothing. `lit_puzzle.model.memory_budget` fills in what is only known when a stage runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_puzzle.model.family import family_of
from lit_puzzle.model.footprint import ModelSize
from lit_puzzle.model.layout import MXFP4_BLOCK, layer_blocks, layer_shapes, whole
from lit_puzzle.run.footprint import GIB, Device

CONVERTING_BYTES_PER_BLOCK_BYTE = 12  # `lit_puzzle.model.mxfp4`: index, looked-up values, scales, and the pages around
TEMPORARIES = 1.25  # buffers of the layer's arithmetic that live beside those counted below
IMPORTED = int(0.5 * GIB)  # of Python and its libraries on a CPU, before a stage has begun
KEPT, OUTSIDE = "kept by the stage", "embedding, last norm and head"


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


def too_small(memory_gib: float, need: Need, model: object) -> str | None:
    """Return what to say of a budget that has no room for one layer; None where it has.

    Args:
        memory_gib: the budget.
        need: what one layer takes.
        model: the folder of the model, for the message.
    """
    if not 0 < memory_gib < math.inf:
        return f"memory_gib={memory_gib} was given; it is above 0, or null to keep the whole model in memory."
    if memory_gib * GIB >= need.smallest:
        return None
    needed = math.ceil(need.smallest / GIB * 100) / 100
    return (
        f"memory_gib={memory_gib:g} was given; {model} needs at least {needed:.2f} GiB with one layer in memory "
        f"({need.describe()} GiB). Raise memory_gib, or make batches smaller."
    )


def weight_bytes(config: Mapping[str, Any], width: int) -> int:
    """Return the bytes of the largest layer in memory, with numbers of `width` bytes."""
    counts = {experts for experts, _ in layer_blocks(config)}
    shapes = (layer_shapes(config, experts, mxfp4=False).values() for experts in counts)
    return max(width * sum(math.prod(shape) for shape in layer) for layer in shapes)


def converting_bytes(config: Mapping[str, Any]) -> int:
    """Return the bytes in which one MXFP4 expert matrix is dequantized."""
    blocks = [shape for name, shape in layer_shapes(config, 1, mxfp4=True).items() if name.endswith("_blocks")]
    return CONVERTING_BYTES_PER_BLOCK_BYTE * max(math.prod(shape) for shape in blocks)


def layer_bytes(config: Mapping[str, Any], tokens: float, row_tokens: float, width: int) -> int:
    """Return the bytes of the activations of one layer's forward pass without gradients.

    Args:
        config: of the model.
        tokens: tokens of the batch, padding included.
        row_tokens: tokens of its longest row.
        width: bytes of a number of the arithmetic.
    """
    keys = family_of(config).config
    hidden, inner = whole(config, "hidden_size"), whole(config, keys.expert_width)
    heads, kv_heads = whole(config, "num_attention_heads"), whole(config, "num_key_value_heads")
    channels = config.get("head_dim") or hidden // heads
    chosen = whole(config, keys.experts_per_token)
    attention = channels * (5 * heads + 4 * kv_heads)  # queries, keys, values: projected, rotated, padded; the output
    experts = chosen * (2 * hidden + 4 * inner)  # of every choice: input, output, gate and up, their product
    per_token = width * (5 * hidden + max(attention, experts))
    return int(TEMPORARIES * tokens * (per_token + 2 * row_tokens // MXFP4_BLOCK))


@dataclass(frozen=True)
class Streamed:
    """What a stage holds that reads its model layer by layer.

    Attributes:
        parts: what is held -> bytes, of one process.
        refusal: what the stage says where its budget is too small; None where it is not.
    """

    parts: Mapping[str, float]
    refusal: str | None

    @property
    def loaded(self) -> dict[str, float]:
        """What is there before the first layer is read."""
        return {name: self.parts[name] for name in (KEPT, OUTSIDE)}


def streamed(
    size: ModelSize,
    width: int,
    device: Device,
    memory_gib: float,
    computing: float,
    kept: float = 0.0,
    head: bool = False,
) -> Streamed:
    """Return what a stage holds under a budget: the same numbers that the stage checks when it runs.

    Args:
        size: the model.
        width: bytes of a number of its weights in memory.
        device: where it computes.
        memory_gib: the budget.
        computing: bytes of activations, those of a layer's forward pass included.
        kept: bytes that the stage has allocated before.
        head: whether the head is used.
    """
    config, cpu = size.config, device.kind == "cpu"
    ends = size.hidden + size.table * (1 + (head and not size.tied))
    outside = 0 if cpu and _stored_width(config) == width else ends * width
    converting = converting_bytes(config) if "quantization_config" in config else 0
    before = int(kept) + IMPORTED * cpu
    need = Need(before, outside, weight_bytes(config, width), converting, int(computing))
    ahead = memory_gib * GIB >= need.ahead
    parts = {
        KEPT: float(kept),
        OUTSIDE: float(need.outside),
        "one layer from disk, and the next" if ahead else "one layer from disk": float(need.layer * (1 + ahead)),
        "an expert while it is converted": float(converting * (1 + ahead)),
        "activations of one layer": float(computing),
    }
    return Streamed(parts, too_small(memory_gib, need, "the model"))


def refusals(found: Streamed | None) -> tuple[str, ...]:
    """Return what a stage will say of its budget, for `Footprint.refusals`."""
    return () if found is None or found.refusal is None else (found.refusal,)


def _stored_width(config: Mapping[str, Any]) -> int:
    """Return the bytes of a stored number of embedding and head."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return 4 if name == "float32" else 2
