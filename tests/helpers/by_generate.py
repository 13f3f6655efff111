"""Greedy completions by transformers' own `generate`: what the engines are compared with."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, GenerationConfig

from lit_puzzle.generation.engine import Completion


def by_generate(
    model: Any, prompts: Sequence[Sequence[int]], cap: int, make_cache: Callable[[], Cache] | None = None
) -> list[Completion]:
    """One left-padded batch; completions end after the end tokens of the model's generation configuration."""
    configured = model.generation_config.eos_token_id
    ends = set(configured) if isinstance(configured, list) else {configured}
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = GenerationConfig(do_sample=False, max_new_tokens=cap, eos_token_id=sorted(ends), pad_token_id=0)
    cache = None if make_cache is None else make_cache()
    with torch.no_grad():
        rows = model.generate(ids, attention_mask=mask, generation_config=settings, past_key_values=cache)
    completions = []
    for row in rows[:, longest:].tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), None)
        tokens = row if stop is None else row[: stop + 1]
        completions.append(Completion(tokens, "length" if stop is None else "stop"))
    return completions
