"""KV caches of random numbers in the state that a given number of tokens leaves, for timing decode steps.

Reads and writes nothing. Memory: batch * 2 * KV heads * head_dim * min(window, tokens) values of every layer.
"""

import copy

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from lit_puzzle.costs.machine import Machine
from lit_puzzle.model.blocks import PuzzleConfig


def filled_cache(config: PuzzleConfig, batch_size: int, tokens: int, machine: Machine) -> DynamicCache:
    """Return a cache of random numbers in the state after `tokens` tokens of every sequence."""
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        held = tokens
        if isinstance(layer, DynamicSlidingWindowLayer):
            held = min(tokens, layer.sliding_window - 1)
        keys, values = (_random(config, batch_size, held, machine) for _ in range(2))
        cache.update(keys, values, index)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = tokens
    return cache


def _random(config: PuzzleConfig, batch_size: int, tokens: int, machine: Machine) -> Tensor:
    return machine.random(batch_size, config.num_key_value_heads, tokens, config.head_dim)


def same_cache(cache: DynamicCache) -> DynamicCache:
    """Return a cache of the same tensors: a step appends to it by making new tensors, the original stays unchanged."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
