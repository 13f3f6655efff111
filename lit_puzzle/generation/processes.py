"""An engine's process, as the process that started it sees it: calls, answers, and every way in which it can fail.

A failure is one line: what the engine refused, that it ended and how, or that it hangs. Engines end with the process
that started them, even where that is killed: `lit_puzzle.generation.engine_process` watches for it. Reads and writes
nothing. Traffic: what is called, through a pipe.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any, Protocol

import torch

from lit_puzzle.generation.progress import ENGINE

PROCESS = "lit_puzzle.generation.engine_process"
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK")
CLOSING_SECONDS = 20.0


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them; none on a CPU."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


class EngineProcess:
    """One engine's process, and the connection to it.

    Args:
        name: for messages.
        number: of this engine among several, of which the first tells its progress.
        gpus: GPUs that it sees; empty: no change.
        variables: further environment variables.
        advice: what to do when it ends for want of memory.
    """

    def __init__(
        self,
        name: str,
        number: int,
        gpus: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        advice: str = "or give fewer engines (engine.data_parallel)",
    ) -> None:
        self.name, self.number, self.advice = name, number, advice
        self.connection, other = Pipe()
        inherited = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
        environment = inherited | {ENGINE: str(number)} | dict(variables or {})
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        # A session of its own: vLLM's processes, its children, end with it, and Ctrl-C reaches the stage first.
        self.process = subprocess.Popen(
            [sys.executable, "-m", PROCESS, str(other.fileno())],
            pass_fds=[other.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        other.close()

    def send(self, name: str, *arguments: object) -> None:
        """Call it; what a process that has ended would answer is found when it is waited for."""
        with suppress(OSError):
            self.connection.send((name, arguments))

    def receive(self, silent_seconds: float | None = None) -> Any:
        """Return its answer.

        Args:
            silent_seconds: longest time in which it may tell nothing; None: any.

        Raises:
            ValueError: it failed, has ended, or told nothing for too long.
        """
        while True:
            kind, answer = self.message(silent_seconds)
            if kind == "done":
                return answer

    def message(self, silent_seconds: float | None = None) -> tuple[str, Any]:
        """Return the next thing that it tells: `done` and its answer, or what it tells before that.

        Args:
            silent_seconds: longest time in which it may tell nothing; None: any.

        Raises:
            ValueError: it failed, has ended, or told nothing for too long.
        """
        try:
            if silent_seconds is not None and not self.connection.poll(silent_seconds):
                raise ValueError(
                    f"{self.name} has generated nothing for {silent_seconds:g} seconds: it hangs, or needs longer "
                    "than rollouts.engine_seconds. The same command resumes."
                )
            kind, content = self.connection.recv()
        except (EOFError, OSError):
            raise ValueError(self.ended()) from None
        if kind == "refused":
            raise ValueError(f"{self.name}: {content}")
        return kind, content

    def ended(self) -> str:
        """Return how it has ended, once its connection has."""
        code = self.process.wait()
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return (
            f"{self.name} {ended}, most often for want of memory, or for the reason in its log above. Free memory, "
            f"{self.advice}, and run the same command again."
        )

    def close(self) -> None:
        """Let it end."""
        self.connection.close()

    def end(self, patience_seconds: float) -> None:
        """Wait for its end; then end it, and whatever it has started."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_seconds)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Ending(Protocol):
    """What can be asked to end: an engine's process, or a connection to one."""

    def close(self) -> None:
        """Let it end."""
        ...

    def end(self, patience_seconds: float) -> None:
        """Wait for its end; then end it."""
        ...


def close_all(processes: Sequence[Ending], patience_seconds: float = CLOSING_SECONDS) -> None:
    """Let all processes end, at once, and end those that do not."""
    for process in processes:
        process.close()
    for process in processes:
        process.end(patience_seconds)
