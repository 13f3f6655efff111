"""The devices that costs are predicted for, as data: memory, bandwidths and arithmetic of each, with sources.

Reads `gpus.json` beside this file, once. Every device names its source; to add a device, add an entry there. The key
`cpu` is one core of the machine that its entry describes.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

GPU_FILE = Path(__file__).with_name("gpus.json")


@dataclass(frozen=True)
class VLLMDefaults:
    """What vLLM takes on a device unless it is told.

    Attributes:
        max_sequences: requests in flight.
        kv_block_tokens: tokens in a block of the KV cache.
    """

    max_sequences: int
    kv_block_tokens: int


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        name: key in gpus.json, which `Scenario.gpu` names.
        memory_gib: memory of one device.
        memory_bytes_per_second: peak bandwidth of its memory.
        bfloat16_flops: peak dense FLOP/s with bfloat16 inputs, two operations per multiply-add.
        fp8_flops: the same with fp8 inputs; None where the device has no such arithmetic.
        float32_flops: the same with float32 inputs; None where it is not known.
        link_bytes_per_second: bandwidth to its neighbors in one direction.
        link_seconds: latency of a message to a neighbor.
        vllm: what vLLM takes there unless it is told.
        source: where these numbers come from.
    """

    name: str
    memory_gib: float
    memory_bytes_per_second: float
    bfloat16_flops: float
    fp8_flops: float | None
    float32_flops: float | None
    link_bytes_per_second: float
    link_seconds: float
    vllm: VLLMDefaults
    source: str


@functools.cache
def gpus() -> dict[str, Gpu]:
    """Return all known devices by name."""
    known = json.loads(GPU_FILE.read_text())
    return {
        name: Gpu(name=name, **(values | {"vllm": VLLMDefaults(**values["vllm"])})) for name, values in known.items()
    }


def find_gpu(name: str) -> Gpu:
    """Return the device called `name`.

    Raises:
        ValueError: gpus.json has no such device.
    """
    known = gpus()
    if name not in known:
        raise ValueError(f"unknown GPU {name!r}; allowed: {sorted(known)}; to add a device, add an entry to {GPU_FILE}")
    return known[name]
