"""The device that a plan is for: the one that was asked for, or the one at hand. Imports no torch.

Reads /proc (memory, NVIDIA's driver) and the recipe's number of devices; writes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from lit_puzzle.costs.gpus import find_gpu, gpus
from lit_puzzle.run.footprint import GIB, Device
from lit_puzzle.run.recipe_values import Values

NVIDIA = Path("/proc/driver/nvidia/gpus")
MEMORY = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup/memory.max")
SMALL_MODEL = 2e9  # parameters; a plan of a smaller model without a GPU at hand is for the CPU


def asked_device(name: str, count: int) -> Device:
    """Return devices by their name in gpus.json.

    Raises:
        ValueError: gpus.json has no such device, or there is none of them.
    """
    if count < 1:
        raise ValueError(f"--gpus={count} was given; 1 or more is needed.")
    if name == "cpu":
        return Device(name, "cpu", count, available_bytes())
    return Device(name, "cuda", count, find_gpu(name).memory_gib * GIB)


def gpus_at_hand() -> list[str]:
    """Return the names, as gpus.json has them, of the NVIDIA GPUs of this machine; `other` where it has none."""
    found = []
    for folder in sorted(NVIDIA.iterdir()) if NVIDIA.is_dir() else ():
        lines = (folder / "information").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("Model")), "")
        found.append(next((name for name in gpus() if name in model), "other"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else found[: len([part for part in visible.split(",") if part.strip()])]


def available_bytes() -> float:
    """Return the memory that processes can still get on this machine, or in its container."""
    lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
    free = 1024.0 * int(lines["MemAvailable"].split()[0])
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    used = CGROUP.with_name("memory.current")
    if limit.isdigit() and used.is_file():
        free = min(free, float(limit) - float(used.read_text()))
    return free


def recipe_devices(values: Values) -> int | None:
    """Return the number of processes that a recipe asks for, or None where it takes what there is (`auto`, -1).

    Raises:
        ValueError: a number of devices or nodes that a Trainer would refuse.
    """
    place = next((name for name in ("trainer", "fabric") if isinstance(values.get(name), dict)), None)
    if place is not None:
        count = device_count(f"{place}.devices", values.get(f"{place}.devices", 1))
        return None if count is None else count * node_count(values.get(f"{place}.num_nodes", 1))
    if isinstance(values.get("engine"), dict):  # engines with GPUs of their own
        engines, ranks = values.get("engine.data_parallel", 1), values.get("engine.tensor_parallel", 1)
        return None if engines == "auto" else _positive("data_parallel", engines) * _positive("tensor_parallel", ranks)
    return 1


def device_count(key: str, value: object) -> int | None:
    """Return the devices of a node that a Trainer's or Fabric's `devices` means; None for all there are.

    Args:
        key: of the recipe, for the message.
        value: a number, a list of indices, `auto` or -1; or the same as text, indices with commas.

    Raises:
        ValueError: it is none of these.
    """
    if value in ("auto", -1, "-1", None):
        return None
    text = isinstance(value, str) and "," in value
    indices = [part for part in str(value).split(",") if part.strip()] if text else value
    if isinstance(indices, list):
        numbers = [_number(index) for index in indices]
        if numbers and None not in numbers and len(set(numbers)) == len(numbers):
            return len(numbers)
    elif _number(indices):
        return _number(indices)
    raise ValueError(f"{key} is {value!r}; a number of at least 1, a list of indices, auto or -1 (all) is needed.")


def _number(value: object) -> int | None:
    """Return a whole number of at least 0, of a number or text; None for anything else."""
    text = "" if isinstance(value, bool) else str(value).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def node_count(value: object) -> int:
    """Return a recipe's number of nodes.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    return _positive("num_nodes", value)


def _positive(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} is {value!r}; a whole number of at least 1 is needed.")
    return value
