"""Greedy generation in left-padded batches, with transformers' own `generate` and cache.

Shapes: B rows of a batch, T prompt tokens, G generated tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def evaluation_mode(policy: PreTrainedModel) -> Iterator[None]:
    """`policy.eval()` inside; afterwards every module is in the mode it was in."""
    training = [module for module in policy.modules() if module.training]
    policy.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def generate_greedily(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[tuple[list[int], bool]]:
    """Greedy answers to a batch of prompts: (generated tokens with the end token, whether it ended by itself) each."""
    end_ids, pad_id = end_and_pad(policy, tokenizer)
    ids_BT, mask_BT = pad_left(prompt_ids, pad_id)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids,
        pad_token_id=pad_id,
        use_cache=True,
    )
    with torch.no_grad():
        sequences = policy.generate(
            ids_BT.to(policy.device), attention_mask=mask_BT.to(policy.device), generation_config=settings
        )
    answers = []
    for row_G in sequences[:, ids_BT.shape[1] :].tolist():
        stop = next((index for index, token in enumerate(row_G) if token in end_ids), None)
        answers.append((row_G if stop is None else row_G[: stop + 1], stop is not None))
    return answers


def end_and_pad(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Every token that ends an answer (generation config and tokenizer), and the padding token."""
    configured = policy.generation_config.eos_token_id
    known = configured if isinstance(configured, list) else [configured]
    end_ids = sorted({int(token) for token in [*known, tokenizer.eos_token_id] if token is not None})
    if not end_ids or tokenizer.pad_token_id is None:
        raise ValueError(
            f"The checkpoint names end tokens {end_ids} and padding token {tokenizer.pad_token_id}: both are needed. "
            "Set eos_token_id in generation_config.json and pad_token in the tokenizer's configuration."
        )
    return end_ids, int(tokenizer.pad_token_id)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token lists -> (ids_BT, mask_BT), padded on the left so that generation starts at one column."""
    longest = max(len(row) for row in rows)
    ids_BT = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows])
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids_BT, mask_BT
