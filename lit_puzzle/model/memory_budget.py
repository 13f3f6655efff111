"""The memory that a model needs when its layers are read from disk one at a time, checked against a budget.

A budget (`memory_gib` in recipes) bounds what a stage holds at once: on a CPU the anonymous memory of the process, on a
GPU what is allocated there. Mapped files (weights in the dtype they are stored in, hidden states) do not count: the
kernel drops their pages when memory is short. The formulas are those of `lit_puzzle.model.streaming_need`, which
`--plan` uses too. Reads /proc/self/status; writes nothing.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.safetensors_file import DTYPES
from lit_puzzle.model.streaming_need import Need, converting_bytes, too_small, weight_bytes
from lit_puzzle.run.footprint import GIB

STATUS = Path("/proc/self/status")


def check_budget(memory_gib: float, need: Need, folder: Path) -> bool:
    """Return whether the next layer may be in memory while one computes.

    Raises:
        ValueError: the budget is not positive, or smaller than what one layer needs; names the number needed.
    """
    refusal = too_small(memory_gib, need, folder)
    if refusal is not None:
        raise ValueError(refusal)
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
    layer = weight_bytes(checkpoint.config, dtype.itemsize)
    packed = any(name.endswith("_blocks") for name in checkpoint.tensors)
    converting = converting_bytes(checkpoint.config) if packed else 0
    return Need(allocated_bytes(device), outside, layer, converting, computing)


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
