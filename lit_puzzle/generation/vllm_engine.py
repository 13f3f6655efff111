"""Completions by vLLM (0.32, 0.33): continuous batching, on a CPU or over `tensor_parallel` GPUs.

Tokens are drawn as the transformers engine draws them, with random numbers of (seed, row, position) only
(`lit_puzzle.generation.vllm_draws`): both engines give the same completions except where rounding decides.
`generation_config.json` gives end tokens and no sampling settings. This needs vLLM's Model Runner V1, which is chosen
through VLLM_USE_V2_MODEL_RUNNER=0; its successor, the default on GPUs, has another interface for processors.

With the option `enable_return_routed_experts` completions carry the experts of each token. vLLM has that in Model
Runner V2 only, which needs Triton, so a GPU: tokens are then drawn by vLLM, with a seed from (seed, row).

Memory: on a GPU vLLM takes 92% of it for the weights and the KV cache. On a CPU it takes the weights and a KV cache of
`CPU_KV_CACHE_GIB`, or as many GiB as the environment variable VLLM_CPU_KVCACHE_SPACE says (vLLM's own default is 92%
of the machine); it has to hold one sequence of the model's context length.
Reads the checkpoint; writes nothing but vLLM's compilation cache.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal
from weakref import finalize

import torch

from lit_puzzle.generation.draws import uniforms
from lit_puzzle.generation.engine import Completion, OnCompletion, check_prompts
from lit_puzzle.generation.progress import Progress
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.stop_tokens import end_tokens_of
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.opening import load_tokenizer

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

CPU_KV_CACHE_GIB = 4
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
DRAWS = "lit_puzzle.generation.vllm_draws:SeededDraws"
LOGITS_SCALE = "logits_scale"  # in a configuration: what the plugin's model multiplies logits with
ROUTES = "enable_return_routed_experts"
READER = "lit_puzzle.generation.vllm_worker.WeightReader"


def load_vllm(
    checkpoint: Path, settings: EngineSettings, options: Mapping[str, Any] | None = None, temperature: float = 1.0
) -> "VLLMEngine":
    """Start vLLM on a checkpoint.

    Args:
        checkpoint: folder, gpt-oss or a child.
        settings: dtype of the weights, GPUs that share them.
        options: further arguments of `vllm.LLM`, or other values of those given here.
        temperature: that log-probabilities are of; needs a child, whose model in vLLM is ours, unless it is 1.

    Raises:
        ValueError: vLLM is not installed, Model Runner V2 is asked for, or vLLM does not start.
    """
    has_routes = bool(dict(options or {}).get(ROUTES))
    runner = "1" if has_routes else "0"
    if os.environ.setdefault(RUNNER, runner) != runner:
        raise ValueError(
            f"{RUNNER}={os.environ[RUNNER]} is set; {'routes need' if has_routes else 'seeded sampling needs'} vLLM's "
            f"Model Runner V{int(runner) + 1}. Unset it, or use engine transformers."
        )
    try:
        from vllm import LLM
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Engine vllm needs vLLM ({error}): pip install 'lit-puzzle[vllm]' (on a CPU: bash scripts/vllm_env.sh), "
            "or use engine transformers."
        ) from error
    end_ids = end_tokens_of(checkpoint, load_tokenizer(checkpoint))
    Checkpoint(checkpoint).check_all()  # vLLM reads the files itself
    arguments: dict[str, Any] = {
        "model": str(checkpoint),
        "dtype": settings.dtype,
        "tensor_parallel_size": settings.tensor_parallel,
        "generation_config": "vllm",  # else sampling settings of generation_config.json become defaults
        "logprobs_mode": "raw_logprobs",  # of the model's distribution, before the processor and the temperature
        "logits_processors": None if has_routes else [DRAWS],
        "worker_extension_cls": READER,
    }
    if not torch.cuda.is_available():
        arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE_GIB * 2**30
    if temperature != 1:
        arguments["hf_overrides"] = {LOGITS_SCALE: 1 / temperature}
    try:
        model = LLM(**arguments | dict(options or {}))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"vLLM does not start on {checkpoint}: {' '.join(str(error).split())} Its log above says more. On a CPU "
            "VLLM_CPU_KVCACHE_SPACE=N gives the KV cache N GiB; engine transformers needs no vLLM."
        ) from error
    wake_on_death(model)
    return VLLMEngine(model, end_ids, checkpoint, temperature, has_routes)


def wake_on_death(model: "LLM") -> None:
    """Let calls that wait for an engine raise EngineDeadError when its main process is killed.

    vLLM (0.32, 0.33) notices the death and closes its connection, but its synchronous client then waits forever, for
    output or for the answer to a call. A worker's death needs no help: the main process reports it.
    """
    from vllm.v1.engine.core_client import SyncMPClient
    from vllm.v1.engine.exceptions import EngineDeadError

    client = model.llm_engine.engine_core
    if not isinstance(client, SyncMPClient):  # the engine runs in this process
        return
    outputs, resources, calls = client.outputs_queue, client.resources, client.utility_results
    sentinels = resources.engine_manager.sentinels()

    def wake() -> None:
        wait(sentinels)
        resources.engine_dead = True  # first: a call puts itself down, then looks at this
        outputs.put(EngineDeadError())
        for call in list(calls.values()):
            with suppress(InvalidStateError):  # an answer came before
                call.set_exception(EngineDeadError())

    Thread(target=wake, name="wake_on_death", daemon=True).start()


class VLLMEngine:
    """A model in vLLM, ready to generate. When this object is dropped, vLLM's processes end and free their memory.

    Args:
        model: started with `SeededDraws` among its logits processors.
        end_ids: tokens that end a completion.
        folder: checkpoint that it started from.
        temperature: by which the model divides its logits: that of the log-probabilities.
        has_routes: whether it started with `enable_return_routed_experts`.

    Attributes:
        on_step: called after every step of a generation, with the number of steps so far: a step makes tokens or
            reads prompts.
    """

    def __init__(
        self,
        model: "LLM",
        end_ids: Sequence[int],
        folder: Path,
        temperature: float = 1.0,
        has_routes: bool = False,
    ) -> None:
        self.model, self.folder, self.temperature, self.has_routes = model, folder, temperature, has_routes
        self.end_ids = list(end_ids)
        self.on_step: Callable[[int], None] = _nothing
        finalize(self, model.llm_engine.engine_core.shutdown)  # `LLM` itself may live on: frames that hold it leak

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        rows: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[Completion]:
        """Return one completion for each prompt; see `lit_puzzle.generation.engine.Engine`.

        Raises:
            ValueError: also an engine whose processes died.
        """
        from vllm import SamplingParams

        context_tokens = self.model.model_config.max_model_len  # vLLM would end a longer completion early
        numbers = check_prompts(prompts, rows, sampling.max_new_tokens, context_tokens)
        drawn = replace(sampling, temperature=sampling.temperature / self.temperature)
        requests = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=self.end_ids,
                logprobs=0 if sampling.logprobs else None,  # of the drawn token, and of none of the most likely ones
                detokenize=False,
                **(drawn_by_vllm(drawn, row) if self.has_routes else drawn_by_us(drawn, row)),
            )
            for row in numbers
        ]
        with self._death_explained("generated"):
            added = self.model.enqueue([{"prompt_token_ids": list(ids)} for ids in prompts], requests, use_tqdm=False)
            names = [name.partition("-")[0] for name in added]  # outputs are without the suffix that vLLM adds to them
            ended = self._run(dict(zip(names, numbers, strict=True)), on_completion)
        return [ended[name] for name in names]

    def read_trained(self, weights: Path) -> None:
        """Read trained tensors from a file of `lit_puzzle.generation.trained_weights`, the others as they were.

        Raises:
            ValueError: the engine's processes died.
        """
        self._reload("read_trained", str(weights), str(self.folder))

    def read_folder(self, folder: Path) -> None:
        """Read all tensors of a checkpoint folder of the same configuration; errors as of `read_trained`."""
        self._reload("read_folder", str(folder))

    def _reload(self, method: str, *arguments: str) -> None:
        with self._death_explained("read weights"):
            self.model.collective_rpc(method, args=arguments)
            self.model.reset_prefix_cache()

    @contextmanager
    def _death_explained(self, doing: str) -> Iterator[None]:
        """Raise ValueError where the engine's death ends what it was doing."""
        from vllm.v1.engine.exceptions import EngineDeadError

        core = self.model.llm_engine.engine_core
        try:
            yield
        except Exception as error:
            resources = getattr(core, "resources", None)  # none where the engine runs in this process
            closed = resources is not None and resources.engine_dead  # before a message was sent: an error of sockets
            if not isinstance(error, EngineDeadError) and not closed:
                raise
            core.shutdown()  # now, so that its messages do not bury the error
            raise ValueError(
                f"vLLM's engine died while it {doing}: one of its processes was killed, most often for want of "
                "memory, or failed for the reason in its log above. Free memory, or lower max_new_tokens or "
                "VLLM_CPU_KVCACHE_SPACE, and run the same command again."
            ) from error

    def sleep(self) -> None:
        """Free the GPU's memory: weights move to the machine's memory, the KV cache is forgotten."""
        with self._death_explained("freed memory"):
            self.model.reset_prefix_cache()
            self.model.sleep(level=1)

    def wake(self) -> None:
        """Take the GPU's memory back."""
        with self._death_explained("took memory back"):
            self.model.wake_up()

    def _run(self, numbers: Mapping[str, int], on_completion: OnCompletion | None) -> dict[str, Completion]:
        """Return the completion of each request, whose prompts have these numbers.

        Progress counts the tokens of finished requests only: vLLM gives out no others.
        """
        progress, engine, begun = Progress(len(numbers)), self.model.llm_engine, time.monotonic()
        ended: dict[str, Completion] = {}
        tokens = steps = 0
        while engine.has_unfinished_requests():
            finished = engine.step()
            steps += 1
            self.on_step(steps)
            for output in finished:
                completion = self._completion(output, round(time.monotonic() - begun, 3))
                ended[output.request_id] = completion
                tokens += len(completion.token_ids)
                if on_completion is not None:
                    on_completion(numbers[output.request_id], completion)
            progress.update(len(ended), tokens)
        return ended

    def _completion(self, output: "RequestOutput", seconds: float) -> Completion:
        (generated,) = output.outputs
        token_ids = list(generated.token_ids)
        logprobs = None
        if generated.logprobs is not None:
            pairs = zip(generated.logprobs, token_ids, strict=True)
            logprobs = [scores[token].logprob for scores, token in pairs]
        finish: Literal["stop", "length"] = "stop" if token_ids[-1] in self.end_ids else "length"
        return Completion(token_ids, finish, logprobs, seconds, generated.routed_experts)


def drawn_by_us(sampling: Sampling, row: int) -> dict[str, Any]:
    """Return the arguments of a request for which `SeededDraws` draws."""
    from lit_puzzle.generation.vllm_draws import draw_argument

    return {"temperature": 0, "extra_args": draw_argument(sampling, row)}


def drawn_by_vllm(sampling: Sampling, row: int) -> dict[str, Any]:
    """Return the arguments of a request for which vLLM draws, with a seed of its own."""
    seed = int(uniforms(sampling.seed, row, 0, 1)[0] * 2**53)
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed}


def _nothing(_steps: int) -> None:
    pass
