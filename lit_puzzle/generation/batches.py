"""Greedy generation in left-padded batches, with transformers' own `generate` and cache.

A batch decodes until its last answer ends, so one endless answer makes every other row wait. In one process answers are
therefore generated in rounds (up to 32 tokens, 128, 512, ...): what has not ended goes on in fewer, full batches, which
read their prompts again. Over processes there is one round: sharded weights need all to generate equally often.

Shapes: B rows of a batch, T prompt tokens, G generated tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

FIRST_ROUND_TOKENS = 32
ROUND_FACTOR = 4

Answer = tuple[list[int], bool]  # generated tokens with the end token, and whether it ended by itself
MakeCache = Callable[[], Cache]  # an empty KV cache of the policy


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


def generate_in_batches(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    order: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    make_cache: MakeCache | None = None,
) -> list[Answer]:
    """Greedy answers to all prompts, in the order of the prompts.

    Args:
        policy: the model, in evaluation mode.
        tokenizer: names the padding token and an end token.
        prompt_ids: token ids of each prompt.
        order: indices of the prompts, those of like length beside each other.
        max_new_tokens: an answer is cut off there.
        batch_size: prompts decoded together.
        make_cache: the KV cache of a batch; None: the model's own.
    """
    answers: list[Answer] = [([], False)] * len(prompt_ids)
    pending, reached = list(order), 0
    for limit in round_limits(max_new_tokens):
        for start in range(0, len(pending), batch_size):
            rows = pending[start : start + batch_size]
            so_far = [prompt_ids[row] + answers[row][0] for row in rows]
            continued = generate_greedily(policy, tokenizer, so_far, limit - reached, make_cache)
            for row, (token_ids, ended) in zip(rows, continued, strict=True):
                answers[row] = (answers[row][0] + token_ids, ended)
        pending, reached = [row for row in pending if not answers[row][1]], limit
    return answers


def round_limits(max_new_tokens: int) -> list[int]:
    """Tokens that answers may have after each round: 32, 128, ... up to the cap; the cap alone over processes."""
    limits = []
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        limit = FIRST_ROUND_TOKENS
        while limit < max_new_tokens:
            limits.append(limit)
            limit *= ROUND_FACTOR
    return [*limits, max_new_tokens]


def generate_greedily(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    make_cache: MakeCache | None = None,
) -> list[Answer]:
    """Greedy answers to one batch of prompts."""
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
            ids_BT.to(policy.device),
            attention_mask=mask_BT.to(policy.device),
            generation_config=settings,
            past_key_values=None if make_cache is None else make_cache(),
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
