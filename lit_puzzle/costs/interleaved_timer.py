"""Measures many pieces of work in turns, on one thread of a CPU or on a GPU.

    seconds of a piece = median over rounds of (time of r runs in a row) / r

Every round times every piece once, from a starting place that moves from round to round (interleaved: a slow minute of
the machine hits all pieces alike); each is prepared and warmed up anew in every round, outside the time. r is chosen at
the first round so that a measurement lasts about 20 ms. CPU: seconds of the process, which others on the machine hardly
change; GPU: CUDA events.

Reads and writes nothing. Memory: what one piece needs, beside what all of them share. Source: this project's own.
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
    """Tells glibc to keep freed memory in the process; does nothing with another C library.

    Without it a KV cache of a few MiB that is freed at the end of every step goes back to the system and is mapped
    again page by page in the next, depending on what else was freed: up to half of a step's time. A serving engine
    allocates its cache once.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)


def seconds(work: Work, runs: int, device: str) -> float:
    """Time of one run, mean over `runs` in a row."""
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
    """Median seconds of each piece of work, measured in turns.

    Raises:
        ValueError: No round.
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
