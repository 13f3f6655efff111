"""Several engines of one model, each a process of its own with its own GPUs, which share the prompts.

Engine i of n gets prompts i, i + n, ... of every call. A completion depends on (seed, row, position) only
(`lit_puzzle.generation.draws`): n engines give the completions of one, except where rounding decides, in the order of
the prompts. An engine that fails or is killed ends all of them with one error; a stage that is resumable goes on from
its last shard.

Reads the checkpoint in every process; writes nothing. Memory: n times that of one engine, on n times as many GPUs.
Traffic: token ids, through pipes.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from weakref import finalize

import torch

from lit_puzzle.generation.engine import Completion, check_prompts
from lit_puzzle.generation.progress import ENGINE
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.model.opening import load_config

PROCESS = "lit_puzzle.generation.engine_process"
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK")
CLOSING_SECONDS = 20.0


def engines_of(settings: EngineSettings) -> int:
    """Return how many engines the settings ask for on this machine.

    Raises:
        ValueError: more engines than there are GPUs for them.
    """
    gpus = len(visible_gpus())
    if settings.data_parallel == "auto":
        return max(gpus // settings.tensor_parallel, 1)
    if gpus and settings.data_parallel * settings.tensor_parallel > gpus:
        raise ValueError(
            f"engine.data_parallel {settings.data_parallel} x tensor_parallel {settings.tensor_parallel} were given; "
            f"{gpus} GPUs are visible. Give data_parallel: auto, or smaller numbers."
        )
    return settings.data_parallel


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them; none on a CPU."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


class DataParallelEngine:
    """Several engines of one checkpoint, ready to generate. When this object is dropped, their processes end.

    Args:
        settings: of each engine.
        checkpoint: folder of the model and its tokenizer.
        count: number of engines.
        options: further arguments of `vllm.LLM`.

    Raises:
        ValueError: one of them does not start.
    """

    def __init__(
        self, settings: EngineSettings, checkpoint: Path, count: int, options: Mapping[str, Any] | None = None
    ) -> None:
        self._context_tokens = int(load_config(checkpoint).max_position_embeddings)
        gpus, share = visible_gpus(), settings.tensor_parallel
        shares = [gpus[share * number : share * (number + 1)] for number in range(count)]
        self._processes = [_Process(number, count, gpus) for number, gpus in enumerate(shares)]
        self.close = finalize(self, _close, self._processes)  # may be called before
        for process in self._processes:
            process.send((replace(settings, data_parallel=1), checkpoint, dict(options or {})))
        self._answers()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int] | None = None
    ) -> list[Completion]:
        """Return one completion for each prompt; see `lit_puzzle.generation.engine.Engine`.

        Raises:
            ValueError: also an engine that failed, or whose process ended.
        """
        numbers = check_prompts(prompts, rows, sampling.max_new_tokens, self._context_tokens)
        count = len(self._processes)
        for first, process in enumerate(self._processes):
            process.send(([list(ids) for ids in prompts[first::count]], sampling, list(numbers[first::count])))
        parts: list[list[Completion]] = self._answers()
        return [parts[place % count][place // count] for place in range(len(prompts))]

    def _answers(self) -> list[Any]:
        """Return the answer of every process, in their order; the first failure ends all of them."""
        waiting = {process.connection: process for process in self._processes}
        answers: dict[int, Any] = {}
        while waiting:
            for ready in wait(list(waiting)):
                assert isinstance(ready, Connection)
                process = waiting.pop(ready)
                try:
                    answers[process.number] = process.receive()
                except ValueError:
                    _close(self._processes, patience_seconds=0)
                    raise
        return [answers[process.number] for process in self._processes]


class _Process:
    """One engine's process, and the connection to it."""

    def __init__(self, number: int, count: int, gpus: Sequence[str]) -> None:
        self.number, self.name = number, f"engine {number} of {count}"
        self.connection, other = Pipe()
        variables = {name: value for name, value in os.environ.items() if name not in OF_A_RANK} | {ENGINE: str(number)}
        if gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        # A session of its own: vLLM's processes, its children, end with it, and Ctrl-C reaches the stage first.
        self.process = subprocess.Popen(
            [sys.executable, "-m", PROCESS, str(other.fileno())],
            pass_fds=[other.fileno()],
            env=variables,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        other.close()

    def send(self, message: object) -> None:
        """Send a message; what a process that has ended would answer is found when it is waited for."""
        with suppress(OSError):
            self.connection.send(message)

    def receive(self) -> Any:
        """Return its answer.

        Raises:
            ValueError: it failed, or has ended.
        """
        try:
            kind, answer = self.connection.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise ValueError(
                f"{self.name} {ended}, most often for want of memory, or for the reason in its log above. Free memory, "
                "or give fewer engines (engine.data_parallel), and run the same command again."
            ) from None
        if kind == "refused":
            raise ValueError(f"{self.name}: {answer}")
        return answer

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


def _close(processes: Sequence[_Process], patience_seconds: float = CLOSING_SECONDS) -> None:
    for process in processes:
        process.close()
    for process in processes:
        process.end(patience_seconds)
