"""A timer for many pieces of work, measured in turns, on one thread of a CPU or on a GPU.

    seconds of a piece = median over rounds of (time of r runs in a row) / r

Every round times every piece once, starting at another piece than the round before (interleaved: a slow minute of the
machine affects all pieces alike). Each piece is prepared and warmed up again in every round, outside the measured time.
r is chosen in the first round so that a measurement takes about 20 ms. The clock is the CPU time of the process, which
other processes hardly influence, or CUDA events on a GPU.

Reads and writes nothing. Memory: what one piece needs, beside what all of them share.
"""

import ctypes
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch

SAMPLE_SECONDS = 0.02
MOST_RUNS = 50
WARM_UP_RUNS = 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
NEVER, LARGEST_MMAP_THRESHOLD = 2**31 - 1, 32 * 2**20

Work = Callable[[], object]


def keep_freed_memory() -> None:
    """Make glibc keep freed memory in the process; does nothing with another C library.

    A KV cache of a few MiB that is freed at the end of every step may otherwise be returned to the system and be mapped
    again, page by page, in the next step, which takes up to half of a step's time. A serving engine allocates its cache
    once.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)


def seconds(work: Work, runs: int, device: str) -> float:
    """Return the seconds of one run, mean over `runs` in a row."""
    if device == "cpu":
        start = time.process_time()
        for _ in range(runs):
            work()
        return (time.process_time() - start) / runs
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(runs):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / runs


def interleaved(prepares: Sequence[Callable[[], Work]], device: str, rounds: int) -> list[float]:
    """Return the median seconds of each piece of work, measured in turns.

    Args:
        prepares: one function per piece that prepares it and returns what is timed.
        device: `cpu`, or a CUDA device.
        rounds: number of measurements of each piece.

    Raises:
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    samples: list[list[float]] = [[] for _ in prepares]
    runs = [0] * len(prepares)
    for turn in range(rounds):
        first = turn * len(prepares) // rounds
        for index in [*range(first, len(prepares)), *range(first)]:
            work = prepares[index]()
            for _ in range(WARM_UP_RUNS):
                work()
            if not runs[index]:
                once = max(seconds(work, 1, device), 1e-9)
                runs[index] = min(MOST_RUNS, math.ceil(SAMPLE_SECONDS / once))
            samples[index].append(seconds(work, runs[index], device))
    return [statistics.median(times) for times in samples]
