"""Runs one stage as a process: its output into a log, signals passed on to it, its end noticed with its CPU time.

The process has a group of its own, so that Ctrl-C in a terminal reaches it once, through the pipeline. If the pipeline
is killed, the kernel sends SIGTERM to the stage, which saves its state and ends. Whatever a stage leaves running in its
group is killed when it ends. Writes the log; needs Linux.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from site import getsitepackages

from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.run.lock import working_process
from lit_puzzle.run.signals import PATIENCE_SECONDS, StoppedError, install_handlers

PR_SET_PDEATHSIG = 1  # of prctl
TICK_SECONDS = 0.2
END_SECONDS = PATIENCE_SECONDS + 20  # in which a stage ends after a signal
LAST_LINES = 12
TAIL_BYTES = 16 << 10
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Ended:
    """How a stage has ended.

    Attributes:
        code: exit code; 128 + number for a signal.
        seconds: on the clock.
        cpu_seconds: of its process and those that it has waited for.
        last_lines: of what it printed.
    """

    code: int
    seconds: float
    cpu_seconds: float
    last_lines: Sequence[str]


def run_process(words: Sequence[str], log: Path, tick: Callable[[float], None]) -> Ended:
    """Run `lightning` with these words to its end.

    Args:
        words: of the command line.
        log: file that its output is appended to.
        tick: is called several times a second with the seconds since the start.

    Raises:
        StoppedError: this process got a signal; the stage has got it, too, and has ended.
    """
    started, cpu = time.monotonic(), _children_seconds()
    with log.open("ab") as stream:
        stream.write(f"$ {shlex.join(['lightning', *words])}\n".encode())
        stream.flush()
        begin = stream.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "lit_puzzle", *words],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=partial(_end_with, os.getpid()),
        )
    install_handlers(partial(os.kill, process.pid))
    try:
        while not _has_ended(process.pid):
            tick(time.monotonic() - started)
            time.sleep(TICK_SECONDS)
    except StoppedError:
        _wait_after_signal(process.pid)
        raise
    finally:
        install_handlers()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # it is not waited for yet, so that its number is not another's
        code = process.wait()
    seconds, used = time.monotonic() - started, _children_seconds() - cpu
    return Ended(code if code >= 0 else 128 - code, seconds, used, last_lines(log, begin))


def _environment() -> dict[str, str]:
    """Return the environment in which this very package runs, and not a folder of its name in the current one."""
    paths = [os.environ.get("PYTHONPATH", ""), "" if str(PACKAGE.parent) in getsitepackages() else str(PACKAGE.parent)]
    return os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _end_with(parent: int) -> None:
    """Ask the kernel, in a new process, for SIGTERM when the pipeline ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it has ended already
        os._exit(128 + signal.SIGTERM)


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _wait_after_signal(pid: int) -> None:
    """Wait until a stage that has got a signal has ended; a second signal is passed on, and ends it at once."""
    deadline = time.monotonic() + END_SECONDS
    while not _has_ended(pid) and time.monotonic() < deadline:
        with suppress(StoppedError):
            time.sleep(TICK_SECONDS)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def last_lines(log: Path, begin: int = 0) -> list[str]:
    """Return the end of a log: from the last error on, or the last lines, without what a terminal would obey."""
    with log.open("rb") as stream:
        stream.seek(max(begin, log.stat().st_size - TAIL_BYTES))
        text = stream.read().decode(errors="replace")
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", text)) if line.strip()]
    errors = [place for place, line in enumerate(lines) if line.startswith("error: ")]
    return lines[errors[-1] :][:LAST_LINES] if errors else lines[-LAST_LINES:]


def wait_for_worker(folder: Path) -> None:
    """Wait for a process that is at work in a stage's folder: after a kill of the pipeline, the stage saves its state.

    Raises:
        ValueError: it does not end in time.
    """
    deadline = time.monotonic() + END_SECONDS
    while (worker := working_process(folder)) is not None:
        if time.monotonic() > deadline:
            raise ValueError(f"{folder} is in use by {worker}. Wait for it, stop it, or choose another --run_dir.")
        time.sleep(TICK_SECONDS)
