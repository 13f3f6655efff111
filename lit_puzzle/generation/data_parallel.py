"""Several engines of one model, each a process of its own with its own GPUs, which share the prompts.

Engine i of n gets prompts i, i + n, ... of every call. A completion depends on (seed, row, position) only
(`lit_puzzle.generation.draws`): n engines give the completions of one, except where rounding decides, in the order of
the prompts. An engine that fails or is killed ends all of them with one error; a resumable stage continues behind
its last shard.

Reads the checkpoint in every process; writes nothing. Memory: n times that of one engine, on n times as many GPUs.
Traffic: token ids, through pipes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from weakref import finalize

from lit_puzzle.generation.engine import Completion, OnCompletion, check_prompts
from lit_puzzle.generation.processes import EngineProcess, close_all, visible_gpus
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.model.opening import load_config


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
        names = [f"engine {number} of {count}" for number in range(count)]
        self._processes = [EngineProcess(names[number], number, own) for number, own in enumerate(shares)]
        self.close = finalize(self, close_all, self._processes)  # may be called before
        for process in self._processes:
            process.send("load", replace(settings, data_parallel=1), checkpoint, dict(options or {}))
        self._answers()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        rows: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[Completion]:
        """Return one completion for each prompt; see `lit_puzzle.generation.engine.Engine`.

        Raises:
            ValueError: also an engine that failed, or whose process ended.
        """
        numbers = check_prompts(prompts, rows, sampling.max_new_tokens, self._context_tokens)
        count, call = len(self._processes), "generate" if on_completion is None else "generate_telling"
        for first, process in enumerate(self._processes):
            own = [list(ids) for ids in prompts[first::count]]
            process.send(call, own, sampling, list(numbers[first::count]))
        parts: list[list[Completion]] = self._answers(on_completion)
        return [parts[place % count][place // count] for place in range(len(prompts))]

    def _answers(self, on_completion: OnCompletion | None = None) -> list[Any]:
        """Return the answer of every process, in their order; the first failure ends all of them."""
        waiting = {process.connection: process for process in self._processes}
        answers: dict[int, Any] = {}
        while waiting:
            for ready in wait(list(waiting)):
                assert isinstance(ready, Connection)
                process = waiting[ready]
                try:
                    kind, content = process.message()
                except ValueError:
                    close_all(self._processes, patience_seconds=0)
                    raise
                if kind == "done":
                    answers[process.number] = content
                    del waiting[ready]
                elif kind == "ended" and on_completion is not None:
                    on_completion(*content)
        return [answers[process.number] for process in self._processes]
