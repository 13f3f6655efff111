"""vLLM beside a model that trains, with its newest weights: an engine for every process, or for several.

    update      the tensors that train go into shared memory, once for each machine; its engines read them there
    generate    each process its prompts; where processes share an engine, the first of them asks for all
    asleep      between a generation and the next call the engine leaves the GPU's memory to training; on a CPU it stays

An engine is a process of its own (`lit_puzzle.generation.processes`), which ends with the process that started it, or
that of a server (`engine: server`, `lit_puzzle.generation.rollout_server`) on other GPUs, which ends with the
connection; each server then answers equally many processes. Whatever goes wrong with it is one ValueError, and the
engine has ended then.

Memory, beside training: of a machine, the sent tensors once, and on GPUs the weights of sleeping engines; of a GPU,
`gpu_memory_share` while generating; on a CPU the engine's weights and `kv_cache_gib`. Traffic of an update: the tensors
that train, gathered if they are sharded, and the unchanged ones of vLLM's rebuilt layers from the folder (experts and
router only if some of them train). Reads the checkpoint folder; writes nothing.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol
from weakref import finalize

import torch
from torch import Tensor

from lit_puzzle.generation.engine import Completion, OnCompletion
from lit_puzzle.generation.processes import EngineProcess, close_all, visible_gpus
from lit_puzzle.generation.ranks import ALONE, Ranks
from lit_puzzle.generation.rollout_checks import check_answers
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.served_engine import ServedEngine
from lit_puzzle.generation.trained_weights import SharedWeights
from lit_puzzle.generation.vllm_engine import CPU_KV_CACHE_GIB, ROUTES
from lit_puzzle.generation.wire import servers_from_environment

ON_A_CPU = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # no compiler; engines share the cores
IN_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # starts faster, and its errors are whole
QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


class Trained(Protocol):
    """A tensor of the checkpoint that training changes; `lit_puzzle.child.trained` has them."""

    @property
    def base(self) -> Tensor:
        """Its parameter in the model, which has its shape."""
        ...

    def value(self) -> Tensor:
        """Return the whole tensor as it is now. Every process must call it."""
        ...


class RolloutEngine:
    """An engine beside a model that trains, as each process of the run sees it.

    Args:
        settings: of rollouts.
        folder: checkpoint from which the engine starts.
        dtype: of its weights, `float32` or `bfloat16`.
        temperature: that log-probabilities are of.
        ranks: the processes; all make one together.

    Raises:
        ValueError: the engine does not start.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        folder: Path,
        dtype: Literal["float32", "bfloat16"] = "float32",
        temperature: float = 1.0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.settings, self.ranks, self.dtype = settings, ranks, dtype
        self._servers = servers = servers_from_environment() if settings.engine == "server" else []
        self._share = ranks.size // len(servers) if servers else settings.tensor_parallel  # processes of an engine
        self._first = ranks.rank - ranks.rank % self._share  # the process that asks for its group
        self._sleeps, self._awake = torch.cuda.is_available() and not servers, True
        self._weights: SharedWeights | None = None
        self._engine: EngineProcess | ServedEngine | None = None
        if ranks.rank == self._first:
            self._engine = self._start(folder, temperature)
            finalize(self, close_all, [self._engine])
            self._answer(None)

    def _start(self, folder: Path, temperature: float) -> EngineProcess | ServedEngine:
        settings, first = self.settings, self.ranks.local_rank
        if self._servers:
            served = ServedEngine(self._servers[self.ranks.rank // self._share])
            served.load(folder, self.dtype, temperature, settings)
            return served
        gpus = visible_gpus()[first : first + settings.tensor_parallel]
        engine = vllm_process(f"vLLM of process {self.ranks.rank}", self.ranks.rank, gpus, settings.tensor_parallel)
        wanted = EngineSettings("vllm", self.dtype, tensor_parallel=settings.tensor_parallel)
        engine.send("load", wanted, folder, engine_options(settings, bool(gpus)), temperature, True)
        return engine

    def update(self, tensors: Mapping[str, Trained]) -> int:
        """Give the engine the weights as they are now; every process must call it.

        Args:
            tensors: what training changes, by the names of the checkpoint.

        Returns:
            Bytes that were sent to each engine.

        Raises:
            ValueError: values that are not finite, or an engine that failed.
        """
        is_writer = self.ranks.local_rank == 0
        if is_writer and self._weights is None:
            shapes = {name: tuple(tensor.base.shape) for name, tensor in tensors.items()}
            self._weights = SharedWeights(shapes, torch.bfloat16 if self.dtype == "bfloat16" else torch.float32)
        written: Path | str | None = None if self._weights is None else self._weights.path
        for name, tensor in tensors.items():
            with torch.autocast(tensor.base.device.type, enabled=False):  # adapters are merged in float32
                value = tensor.value()  # of all processes together: an error has to wait for the others
            try:
                if self._weights is not None:
                    self._weights.write(name, value)
            except ValueError as error:
                written = str(error)
        answers = self.ranks.gather(written)
        for answer in answers:
            if isinstance(answer, str):
                raise ValueError(answer)
        self._call("read_trained", answers[self.ranks.rank - self.ranks.local_rank])
        return sum(tensor.base.numel() for tensor in tensors.values()) * (2 if self.dtype == "bfloat16" else 4)

    def read_folder(self, folder: Path) -> None:
        """Give the engine all weights of a folder of the same configuration."""
        self._call("read_folder", folder, is_silent=True)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        rows: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[Completion]:
        """Return one completion for each prompt; see `lit_puzzle.generation.engine.Engine`.

        Every process must call it where processes share an engine.

        Raises:
            ValueError: also an engine that failed, hangs, or does not answer every prompt.
        """
        own = (prompts, range(len(prompts)) if rows is None else rows)
        share = self._share
        asked = [own] if share == 1 else self.ranks.gather(own)[self._first : self._first + share]
        answer: list[Completion] | str = []
        try:
            if self._engine is not None:
                every_prompt = [list(ids) for ids, _ in asked for ids in ids]
                every_row = [row for _, numbers in asked for row in numbers]
                made: list[Completion] = self._call("generate", every_prompt, sampling, every_row)
                check_answers(made, len(every_prompt), self._engine.name)
                answer = made
                self._sleep()
        except ValueError as error:
            answer = str(error)
        if share > 1:
            answer = self.ranks.gather(answer)[self._first]
        if isinstance(answer, str):
            self.close()
            raise ValueError(answer)
        begin = sum(len(ids) for ids, _ in asked[: self.ranks.rank - self._first])
        completions = answer[begin : begin + len(prompts)]
        for row, completion in zip(own[1], completions, strict=True):
            if on_completion is not None:
                on_completion(row, completion)
        return completions

    def _call(self, name: str, *arguments: object, is_silent: bool = False) -> Any:
        """Call the engine, awake, where this process has it; return its answer. `is_silent`: it may take any time."""
        if self._engine is None:
            return None
        if not self._awake:
            torch.cuda.empty_cache()
            self._engine.send("wake")
            self._answer(self.settings.engine_seconds)
            self._awake = True
        self._engine.send(name, *arguments)
        return self._answer(None if is_silent else self.settings.engine_seconds)

    def _sleep(self) -> None:
        if self._engine is not None and self._sleeps:
            self._engine.send("sleep")
            self._answer(self.settings.engine_seconds)
            self._awake = False

    def _answer(self, silent_seconds: float | None) -> Any:
        assert self._engine is not None
        try:
            return self._engine.receive(silent_seconds)
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """End the engine, and free the memory of the weights."""
        if self._engine is not None:
            close_all([self._engine], patience_seconds=0)
        if self._weights is not None:
            self._weights.close()


def vllm_process(name: str, number: int, gpus: Sequence[str], tensor_parallel: int) -> EngineProcess:
    """Start the process of an engine, which loads nothing yet.

    Args:
        name: for messages.
        number: of this engine among several.
        gpus: that it has; none on a CPU.
        tensor_parallel: GPUs that share its weights.
    """
    quiet = {name: os.environ.get(name, value) for name, value in QUIET.items()}
    variables = quiet | ({} if gpus else ON_A_CPU) | (IN_ONE_PROCESS if tensor_parallel == 1 else {})
    return EngineProcess(name, number, gpus, variables, "or lower rollouts.kv_cache_gib")


def engine_options(settings: RolloutSettings, has_gpu: bool) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` that the settings give."""
    options: dict[str, Any] = {ROUTES: True} if settings.replay_routes else {}
    if settings.context_tokens is not None:
        options["max_model_len"] = settings.context_tokens
    cache_gib = settings.kv_cache_gib if has_gpu else settings.kv_cache_gib or CPU_KV_CACHE_GIB
    if cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
    if has_gpu:
        return options | {"gpu_memory_utilization": settings.gpu_memory_share, "enable_sleep_mode": True}
    return options | {"enforce_eager": True}
