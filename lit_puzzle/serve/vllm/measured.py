"""Token throughput measured in real vLLM on the machine at hand: the best batch of a grid, medians of repeated rounds.

A round sends `batch` requests at once, each of `prompt_tokens` random tokens (other ones in every round, so that no
prefix is cached) that are continued by exactly `generated_tokens`:

    tokens per second = batch x generated_tokens / seconds of the round

Where both engines fit at a time they take turns round by round, so that a machine that slows down slows both; the first
round of each batch warms up and does not count. `seconds` are of the clock on the wall, or, for one thread on a busy
CPU, of the processor. Memory: weights and KV cache of each engine that runs at a time.
"""

import math
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_puzzle.costs.throughputs import Throughputs
from lit_puzzle.run.files import read_json
from lit_puzzle.run.strict_json import check_whole
from lit_puzzle.serve.vllm.check import require_vllm
from lit_puzzle.serve.vllm.turns import RANDOM_WEIGHTS, TurnsEngine

ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
EXECUTION: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "compiled": {},
}  # of `vllm.LLM`
OVERLAPPED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # requests are scheduled while the GPU computes, as in a server
VARIABLES: dict[str, dict[str, str]] = {
    "eager": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},  # in the process whose seconds are counted
    "graphs": OVERLAPPED,
    "compiled": OVERLAPPED | {"TORCHDYNAMO_DISABLE": "0"},
}


@dataclass(frozen=True)
class Workload:
    """What the engines are given to do.

    Args:
        prompt_tokens: length of each prompt.
        generated_tokens: tokens generated after each.
        batches: numbers of requests that run at a time.
        rounds: that count, of each batch.
        seed: of the prompts.

    Raises:
        ValueError: a number below 1, or no batch.
    """

    prompt_tokens: int
    generated_tokens: int
    batches: list[int]
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.batches or min(self.prompt_tokens, self.generated_tokens, self.rounds, *self.batches) < 1:
            raise ValueError(f"{self} was given; all but the seed must be 1 or more, and there must be a batch.")

    @property
    def tokens(self) -> int:
        """Tokens of a request."""
        return self.prompt_tokens + self.generated_tokens


@dataclass(frozen=True)
class MeasuredEngines:
    """The engines, and how their time is taken.

    Args:
        python: interpreter of vLLM's environment (`scripts/vllm_env.sh` prints it).
        dtype: of the weights, where they are not stored in MXFP4.
        execution: `compiled`, vLLM's own way on a GPU (torch.compile and CUDA graphs); `graphs`, without torch.compile;
            `eager`, kernel by kernel, for a CPU: on a GPU it measures how fast kernels are launched.
        weights: `checkpoint`, or `random`: drawn in the shapes of config.json, which is all that a folder then needs.
        kv_dtype: of the KV cache: `auto`, that of the weights, or `fp8`.
        kv_cache_gib: size of each engine's KV cache; null: vLLM's choice, for one engine at a time.
        clock: `wall`, or `cpu` for seconds of the processor, of one thread.
        together: whether both engines run at a time and take turns; false: one after the other.
        tensor_parallel: GPUs that share each engine's weights; on a CPU, processes.

    Raises:
        ValueError: a size that is not positive, two engines at a time without one or on several devices, or seconds of
            the processor where the engine is not in the process that counts them.
    """

    python: Path = Path(".venv-vllm/bin/python")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    execution: Literal["eager", "graphs", "compiled"] = "compiled"
    weights: Literal["checkpoint", "random"] = "checkpoint"
    kv_dtype: Literal["auto", "fp8"] = "auto"
    kv_cache_gib: float | None = None
    clock: Literal["wall", "cpu"] = "wall"
    together: bool = False
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < math.inf:
            raise ValueError(f"kv_cache_gib {self.kv_cache_gib} was given; it must be positive and finite, or null.")
        if self.together and self.kv_cache_gib is None:
            raise ValueError("together: true needs kv_cache_gib, or the first engine takes all memory. Give a size.")
        check_whole("engines", "tensor_parallel", self.tensor_parallel, 1)
        if self.clock == "cpu" and (self.execution != "eager" or self.tensor_parallel > 1):
            raise ValueError(
                f"clock: cpu counts this process, and execution: {self.execution} with tensor_parallel: "
                f"{self.tensor_parallel} computes in others. Use execution: eager without it, or clock: wall."
            )
        if self.together and self.tensor_parallel > 1:
            raise ValueError("together: true runs both engines on one device; with tensor_parallel, leave it out.")


class Measured:
    """Throughputs of vLLM on this machine.

    Args:
        workload: what the engines are given to do.
        engines: the engines, and how their time is taken.
    """

    def __init__(self, workload: Workload, engines: MeasuredEngines = MeasuredEngines()) -> None:
        self.workload, self.engines = workload, engines

    def throughputs(self, run_dir: Path, parent: Path, child: Path) -> Throughputs:
        """Measure both folders.

        Raises:
            ValueError: no vLLM, lengths beyond a model's context, no weights, or an engine that ended.
        """
        python = require_vllm(self.engines.python)
        folders = {"parent": parent, "child": child}
        for folder in folders.values():
            self._check_length(folder)
            if self.engines.weights == "checkpoint" and not any(folder.glob("*.safetensors")):
                raise ValueError(f"{folder} has no *.safetensors; weights: random measures by its config.json alone.")
        seconds: dict[str, dict[int, list[float]]] = {name: {} for name in folders}
        groups = [folders] if self.engines.together else [{name: folder} for name, folder in folders.items()]
        version = ""
        for group in groups:
            with ExitStack() as stack:
                engines = {
                    name: stack.enter_context(self._engine(python, run_dir, name, group[name])) for name in group
                }
                for engine in engines.values():
                    engine.wait_until_ready()
                    version = engine.step({"do": "capacity"})["version"]
                for batch in self.workload.batches:
                    for name, found in self._rounds(engines, batch).items():
                        seconds[name][batch] = found
        return self._found(seconds, version)

    def _check_length(self, folder: Path) -> None:
        context = read_json(folder / "config.json").get("max_position_embeddings")
        if isinstance(context, int) and self.workload.tokens > context:
            raise ValueError(
                f"{self.workload.tokens} tokens a request were given; the context of {folder} is {context}."
            )

    def _engine(self, python: Path, run_dir: Path, name: str, folder: Path) -> TurnsEngine:
        settings: dict[str, Any] = EXECUTION[self.engines.execution] | {
            "dtype": self.engines.dtype,
            "kv_cache_dtype": self.engines.kv_dtype,
            "tensor_parallel_size": self.engines.tensor_parallel,
            "max_model_len": self.workload.tokens + 1,
            "enable_prefix_caching": False,
            "max_num_seqs": max(self.workload.batches),
            "skip_tokenizer_init": True,
        }
        if self.engines.weights == "random":
            settings["load_format"] = RANDOM_WEIGHTS
        if self.engines.kv_cache_gib is not None:
            settings["kv_cache_memory_bytes"] = int(self.engines.kv_cache_gib * 2**30)
        variables = VARIABLES[self.engines.execution] | (ONE_THREAD if self.engines.clock == "cpu" else {})
        if self.engines.tensor_parallel > 1:  # on a CPU vLLM wants a NUMA node for each process otherwise
            variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        return TurnsEngine(python, folder.resolve(), settings, run_dir / f"vllm_{name}.log", variables)

    def _rounds(self, engines: dict[str, TurnsEngine], batch: int) -> dict[str, list[float]]:
        """Return the seconds of the rounds that count."""
        work, taken = self.workload, {name: list[float]() for name in engines}
        for turn in range(work.rounds + 1):
            order = list(engines.items())[:: 1 if turn % 2 else -1]
            step = {"do": "timed", "requests": batch, "prompt": work.prompt_tokens, "generated": work.generated_tokens}
            for name, engine in order:
                taken[name].append(engine.step(step | {"seed": work.seed * 1000 + turn})[self.engines.clock])
        return {name: seconds[1:] for name, seconds in taken.items()}

    def _found(self, seconds: dict[str, dict[int, list[float]]], version: str) -> Throughputs:
        work, used = self.workload, self.engines
        tried = {
            str(batch): {
                name: batch * work.generated_tokens / statistics.median(rounds[batch])
                for name, rounds in seconds.items()
            }
            for batch in work.batches
        }
        best = {name: max(row[name] for row in tried.values()) for name in seconds}
        turns = "engines in turns" if used.together else "one engine after the other"
        text = (
            f"this machine, vLLM {version}, {used.dtype}, {used.execution}, KV cache {used.kv_dtype}, weights "
            f"{used.weights}, {used.tensor_parallel} devices, {work.prompt_tokens} prompt and {work.generated_tokens} "
            f"generated tokens, batches {work.batches}, median of {work.rounds} rounds in {used.clock} seconds, {turns}"
        )
        return Throughputs(best["parent"], best["child"], "measured", text, tried)
