"""Runs jobs of graders in worker processes, all cores at once, each with a limit of wall-clock time.

A job that takes too long, or whose process dies, gets a reply that says so (`{"failed": ...}`); its process is killed
and replaced, and the other jobs go on. Nothing waits for a grader without end. Workers end with the process that
started them: at once when they are idle, by their CPU time when they compute.

Reads and writes nothing. Needs no torch. Memory: 60 MB a worker with sympy. Measured: 0.5 s to start, then 20 to 80 ms
of CPU for a comparison by math-verify and 1 ms for a schema.
"""

import atexit
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lit_puzzle.environments.graders import grading_worker

SECONDS = 5.0  # of a job, from when its library is loaded
START_SECONDS = 300.0  # to start and to load the library, on a busy machine
LIBRARIES = {
    "symbolic": ("math_verify", "math-verify"),
    "schema": ("jsonschema", "jsonschema"),
    "language": ("langdetect", "langdetect"),
}

GRADERS = ("-P", str(Path(grading_worker.__file__)))  # -P: the folder of the file, which Python would search first,
# has modules of its own

_idle: dict[int, list["_Worker"]] = {}  # of each process, so that a forked one starts its own


def require_library(kind: str, what: str) -> None:
    """Refuse a kind of job whose library is not installed.

    Raises:
        ValueError: it is missing; the message says how to install it.
    """
    module, package = LIBRARIES[kind]
    if find_spec(module) is None:
        raise ValueError(f"{what} needs {package}, which is not installed: pip install 'lit-puzzle[graders]'.")


def cores() -> int:
    """Return the number of cores for this process: those it may use, shared with the other ranks of its host."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def run_jobs(
    jobs: Sequence[dict[str, Any]],
    seconds: float | None = None,
    program: tuple[str, ...] = GRADERS,
    workers: int | None = None,
) -> list[dict[str, Any]]:
    """Return the reply to each job, in order.

    Args:
        jobs: see `grading_worker`; each is sent as JSON.
        seconds: of wall clock that a job may take; None: `SECONDS`.
        program: arguments of Python for a process that answers jobs; the number of its connection is added.
        workers: processes at a time; None: one for each core.
    """
    limit = SECONDS if seconds is None else seconds
    workers = workers or cores()
    replies: list[dict[str, Any]] = [{} for _ in jobs]
    waiting = list(range(len(jobs)))[::-1]
    at_work: dict[Connection, _Worker] = {}
    while waiting or at_work:
        while waiting and len(at_work) < workers:
            worker = _take(program)
            number = waiting.pop()
            worker.begin(number, jobs[number] | {"seconds": limit})
            at_work[worker.connection] = worker
        first = min(worker.deadline for worker in at_work.values())
        wait(list(at_work), timeout=max(0.0, first - time.monotonic()))
        for connection, worker in list(at_work.items()):
            reply = worker.reply(limit)
            if reply is not None:
                replies[worker.number] = reply
                del at_work[connection]
    return replies


class _Worker:
    """A worker process and the job that it is at."""

    def __init__(self, program: tuple[str, ...]) -> None:
        self.program = program
        self.connection, other = Pipe()
        command = [sys.executable, *program, str(other.fileno())]
        nothing = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, pass_fds=[other.fileno()], stdin=nothing, stdout=nothing, stderr=nothing
        )
        other.close()
        self.number, self.deadline = -1, 0.0

    def begin(self, number: int, job: dict[str, Any]) -> None:
        """Send a job."""
        self.number, self.deadline = number, time.monotonic() + START_SECONDS
        try:
            self.connection.send_bytes(json.dumps(job).encode())
        except ConnectionError:  # it has died meanwhile; `reply` finds that out
            self.deadline = time.monotonic()

    def reply(self, seconds: float) -> dict[str, Any] | None:
        """Return the reply to the job; None while it is running."""
        try:
            while self.connection.poll():
                message: dict[str, Any] = json.loads(self.connection.recv_bytes())
                if "begun" not in message:
                    _idle.setdefault(os.getpid(), []).append(self)
                    return message
                self.deadline = time.monotonic() + seconds
        except (EOFError, ConnectionError):
            return {"failed": f"its process ended with {self.close()}"}
        if time.monotonic() < self.deadline:
            return None
        self.close()
        return {"failed": f"no verdict within {seconds:g} s"}

    def alive(self) -> bool:
        """Return whether the process runs."""
        return self._process.poll() is None

    def close(self) -> int:
        """End the process and return its exit code."""
        self.connection.close()
        if self.alive():
            try:
                self._process.wait(1.0)  # it may be ending by itself, which its code tells
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()


def _take(program: tuple[str, ...]) -> _Worker:
    idle = _idle.setdefault(os.getpid(), [])
    for worker in [one for one in idle if one.program == program]:
        idle.remove(worker)
        if worker.alive():
            return worker
        worker.close()
    return _Worker(program)


@atexit.register
def close_workers() -> None:
    """End the idle workers of this process."""
    for worker in _idle.pop(os.getpid(), []):
        worker.close()
