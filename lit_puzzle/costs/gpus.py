"""The devices that costs are predicted for, as data: memory, bandwidths and arithmetic of each, with sources.

Reads `gpus.json` beside this file, once. Every device of that file names its source; a new device is a new entry there
and nothing else. The key `cpu` is the machine the numbers were measured on, no particular product.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

GPU_FILE = Path(__file__).with_name("gpus.json")


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        name: Its key in gpus.json, what `Scenario.gpu` names.
        memory_gib: Of one device.
        memory_bytes_per_second: Peak bandwidth of its memory.
        bfloat16_flops: Peak dense multiply-adds a second, counted as two operations each, with bfloat16 inputs.
        fp8_flops: The same with fp8 inputs; None where the device has no such arithmetic.
        float32_flops: The same with float32 inputs; None where it is not known.
        link_bytes_per_second: To its neighbors, one direction.
        link_seconds: From the start of a message to its arrival, without its length.
        max_sequences: Requests that a serving engine keeps in flight there, unless it is told otherwise.
        source: Where these numbers come from.
    """

    name: str
    memory_gib: float
    memory_bytes_per_second: float
    bfloat16_flops: float
    fp8_flops: float | None
    float32_flops: float | None
    link_bytes_per_second: float
    link_seconds: float
    max_sequences: int
    source: str


@functools.cache
def gpus() -> dict[str, Gpu]:
    """All known devices by name."""
    return {name: Gpu(name=name, **values) for name, values in json.loads(GPU_FILE.read_text()).items()}


def find_gpu(name: str) -> Gpu:
    """The device called `name`.

    Raises:
        ValueError: When gpus.json has no such device.
    """
    known = gpus()
    if name not in known:
        raise ValueError(f"unknown GPU {name!r}; allowed: {sorted(known)}; a new device is a new entry in {GPU_FILE}")
    return known[name]
