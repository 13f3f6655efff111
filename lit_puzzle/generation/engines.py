"""Sampled answers of a parent to batches of prompts, by transformers or by vLLM (`lit_puzzle.generation.vllm_engine`).

transformers: batches in rounds (up to 32 tokens, 128, 512, ...): what has not ended goes on in fewer, full batches,
which read their prompts again. The parent is on one device.

Memory: the weights + the KV cache, batch_size * 2 * KV heads * head_dim * bytes per value * sum over layers of
min(window, prompt + max_new_tokens). Reads the checkpoint; writes nothing.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_puzzle.generation.batches import Answer, end_and_pad, pad_left, round_limits
from lit_puzzle.generation.policy import load_policy
from lit_puzzle.generation.sampling import Answers, Sampling, cut_at_end
from lit_puzzle.generation.vllm_engine import vllm_engine
from lit_puzzle.model.loading import DtypeName

EngineName = Literal["auto", "transformers", "vllm"]


def start_engine(
    engine: EngineName, parent: Path, dtype: DtypeName, sampling: Sampling, batch_size: int, tensor_parallel: int
) -> Answers:
    """Loads the parent into an engine; `auto` is vLLM where it is installed and there is a GPU."""
    installed = torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
    if engine == "vllm" or (engine == "auto" and installed):
        return vllm_engine(parent, dtype, sampling, tensor_parallel)
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
