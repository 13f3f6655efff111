"""Anonymous memory (RssAnon) of work done in a process of its own: mapped files do not count, buffers do."""

import ctypes
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def give_freed_memory_back() -> None:
    """What earlier work has freed is no longer this process's: sizes that are read next hold in its forks too."""
    ctypes.CDLL(None).malloc_trim(0)


def _send_measured(work: Callable[[], object], answer: Connection) -> None:
    allocator = ctypes.CDLL(None)  # glibc: no freed memory may be re-used unseen, neither older nor our own
    allocator.malloc_trim(0)
    allocator.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    allocator.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would count 2 MiB for one byte
    stop, samples = threading.Event(), [anonymous_bytes()]

    def watch() -> None:
        while not stop.wait(0.0005):
            samples.append(anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        stop.set()
        thread.join()
    answer.send((samples[0], max(samples)))


def peak_bytes(work: Callable[[], object]) -> int:
    """Largest RssAnon while `work` runs in a fork of this process, above what it was at the start."""
    start, largest = start_and_peak(work)
    return largest - start


def start_and_peak(work: Callable[[], object]) -> tuple[int, int]:
    """RssAnon when `work` starts in a fork of this process, which gives freed memory back first, and its largest."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send_measured, args=(work, sender))
    process.start()
    sender.close()
    measured: tuple[int, int] = receiver.recv()
    process.join()
    return measured
