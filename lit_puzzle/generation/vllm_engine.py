"""Completions by vLLM (0.31 to 0.33): continuous batching over `tensor_parallel` GPUs.

Memory: vLLM takes 90% of each GPU for the weights and its KV cache. On a CPU it wants as much of the machine's memory;
the environment variable VLLM_CPU_KVCACHE_SPACE (GiB of KV cache) makes it take that and the weights.
Reads the checkpoint; writes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from lit_puzzle.generation.engine import Completion, check_prompts
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.stop_tokens import end_tokens_of


class VLLMEngine:
    """A checkpoint in vLLM.

    Args:
        checkpoint: folder, gpt-oss or a child.
        settings: dtype of the weights, GPUs that share them.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(self, checkpoint: Path, settings: EngineSettings) -> None:
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            raise ValueError(
                "engine vllm needs vLLM: pip install 'lit-puzzle[vllm]', or use engine transformers."
            ) from error
        self.end_ids = end_tokens_of(checkpoint, AutoTokenizer.from_pretrained(checkpoint))
        self.model = LLM(model=str(checkpoint), dtype=settings.dtype, tensor_parallel_size=settings.tensor_parallel)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int] | None = None
    ) -> list[Completion]:
        """Return one completion for each prompt; see `lit_puzzle.generation.engine.Engine`."""
        from vllm import SamplingParams

        requests = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=self.end_ids,
                seed=(sampling.seed + row) % 2**31,
                detokenize=False,
            )
            for row in check_prompts(prompts, rows)
        ]
        given = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self.model.generate(given, requests, use_tqdm=False)
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        return [Completion(ids, "stop" if ids[-1] in self.end_ids else "length") for ids in token_ids]
