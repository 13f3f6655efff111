"""Sampled answers of a parent by vLLM (0.31 to 0.33): continuous batching over `tensor_parallel` GPUs.

Memory: vLLM takes 90% of each GPU for the weights and its KV cache. On a CPU it wants as much of the machine's memory;
the environment variable VLLM_CPU_KVCACHE_SPACE (GiB of KV cache) makes it take that and the weights.
Reads the checkpoint; writes nothing. Needs vLLM, torch and transformers; the stage `generate` all requirements beside
them (`lit-puzzle[vllm]`). Run on vllm-cpu 0.31 and 0.32 only.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from lit_puzzle.generation.batches import Answer
from lit_puzzle.generation.sampling import Answers, Sampling, cut_at_end


def vllm_engine(parent: Path, dtype: str, sampling: Sampling, tensor_parallel: int) -> Answers:
    """Loads the parent into vLLM.

    Args:
        parent: Checkpoint folder, gpt-oss or a child.
        dtype: Of the weights: `float32` or `bfloat16`.
        sampling: How answers are drawn.
        tensor_parallel: GPUs that share the weights.

    Returns:
        What answers prompts; each request has a seed of its own, so that an answer does not depend on what is decoded
        beside it.

    Raises:
        ValueError: vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ModuleNotFoundError as error:
        raise ValueError("engine: vllm needs vLLM: pip install 'lit-puzzle[vllm]', or engine: transformers.") from error
    tokenizer = AutoTokenizer.from_pretrained(parent)
    end_ids = end_ids_of(parent, tokenizer)
    model = LLM(model=str(parent), dtype=dtype, tensor_parallel_size=tensor_parallel)

    def answers(prompts: Sequence[list[int]], seed: int) -> list[Answer]:
        requests = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=end_ids,
                seed=(seed + row) % 2**31,
                detokenize=False,
            )
            for row in range(len(prompts))
        ]
        outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], requests, use_tqdm=False)
        return [cut_at_end(list(output.outputs[0].token_ids), end_ids) for output in outputs]

    return answers


def end_ids_of(parent: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer, as `end_and_pad` finds them, from the folder's files."""
    has_config = (parent / "generation_config.json").is_file()
    configured = GenerationConfig.from_pretrained(parent).eos_token_id if has_config else None
    known = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*known, tokenizer.eos_token_id] if token is not None})
