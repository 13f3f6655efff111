"""What every part of the GPU check shares: its options, its result file, and skips by name.

A part is a script with a function that yields rows (flat dicts); what there is when its time is over is kept. A row may
have `ok`: whether it is right. Timed with the clock of the wall, after the device is done.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How a part runs.

    Attributes:
        device: `cuda` or `cpu`.
        small: sizes for a CPU.
        folder: for files of the part's own.
    """

    device: str
    small: bool
    folder: Path


class Skipped(Exception):  # noqa: N818  (not an error)
    """The part does not run here, and why."""


def run(work: Callable[[Options], Iterator[Row]]) -> None:
    """Run a part as a script: `--device`, `--small`, `--out FILE`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rows: list[Row] = []
    try:
        for row in work(Options(arguments.device, arguments.small, folder)):
            rows.append(row)
            write(arguments.out, {"status": "unfinished", "rows": rows})
    except Skipped as reason:
        write(arguments.out, {"status": "skipped", "reason": str(reason), "rows": rows})
    else:
        right = all(row.get("ok", True) for row in rows)
        write(arguments.out, {"status": "ok" if right else "wrong", "rows": rows})


def write(file: Path, result: dict[str, Any]) -> None:
    """Write the result of a part."""
    file.write_text(json.dumps(result))


def synchronize(device: str) -> None:
    """Wait until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], device: str, rounds: int = 3) -> float:
    """Return the median time of a call, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times[1:]), 3)


def peak_mib(work: Callable[[], Any], device: str) -> float | None:
    """Return the most that a call holds on the GPU beyond what was there; None on a CPU."""
    if device != "cuda":
        work()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return |value - reference| / |reference|, of all elements together."""
    value, reference = value.detach().double(), reference.detach().double()
    return float(f"{float((value - reference).norm() / reference.norm()):.2g}")
