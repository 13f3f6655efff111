"""Exact counts of parameters, bytes, cached tokens and touched experts: the arithmetic behind costs, without seconds.

Reads and writes nothing. What tensor parallelism cannot split is counted on every GPU that holds it.

    parameters of a layer    norms 2H + attention + router E (H + 1) + experts E (3 H I + 2 I + H)
    attention                H (2 Q + 2 K) + sinks, one per query head + biases Q + 2 K + H
    cached tokens            (1 / G) x sum over j = 1..G of min(P + j, window)
    touched experts          E (1 - (1 - k / E)^B)

Source: the tensors of gpt-oss (`lit_puzzle.model.layout`, which the counts are tested against); MXFP4 stores 32 values
of 4 bits with one scale of 8 bits; arXiv 2602.11937 for windows.
Legend: H hidden, I intermediate, Q query heads x head_dim, K key-value heads x head_dim, E experts of a layer, k of
them per token, B tokens of a step, P prompt tokens, G generated tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lit_puzzle.costs.serving import ModelShape, Setting
from lit_puzzle.spec import WEIGHT_BITS, Scenario

# Nodes and weights of Gauss-Legendre quadrature with 3 points on [0, 1]: exact for polynomials of degree 5.
QUADRATURE = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))


def distinct_experts(num_experts: float, experts_per_token: int, tokens: float) -> float:
    """Experts that at least one of `tokens` is routed to, on average, if all are equally likely."""
    if experts_per_token >= num_experts:
        return float(num_experts)
    return -num_experts * math.expm1(tokens * math.log1p(-experts_per_token / num_experts))


def layer_parameters(model: ModelShape, num_experts: int, counted_experts: int) -> int:
    """Numbers of one layer with `counted_experts` of its experts; the router always counts whole."""
    queries, keys = model.num_query_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = model.hidden * (2 * queries + 2 * keys) + model.num_query_heads  # and one sink per head
    if model.attention_bias:
        attention += queries + 2 * keys + model.hidden
    router = num_experts * (model.hidden + 1)
    expert = 3 * model.hidden * model.intermediate + 2 * model.intermediate + model.hidden
    return 2 * model.hidden + attention + router + counted_experts * expert


def layer_weight_bytes(setting: Setting, num_experts: int) -> float:
    """Bytes of one layer's weights on each GPU.

    Shared by the ranks: query heads and their sinks, key-value heads up to one per rank, experts with their first bias.
    Whole on every rank: norms, router, the output projection's bias, and the second bias of the experts that it holds.
    """
    model, ranks, groups = setting.model, setting.deployment.tensor_parallel, setting.deployment.expert_parallel
    queries = model.num_query_heads * model.head_dim / ranks
    keys = -(-model.num_kv_heads // ranks) * model.head_dim
    plain = 2 * model.hidden + model.hidden * (2 * queries + 2 * keys) + model.num_query_heads / ranks
    if model.attention_bias:
        plain += queries + 2 * keys + model.hidden
    plain += num_experts * (model.hidden + 1)
    plain += num_experts * (2 * model.intermediate / ranks + model.hidden / groups)
    matrices = num_experts * 3 * model.hidden * model.intermediate / ranks
    weight_bits, expert_bits = WEIGHT_BITS[setting.scenario.weight_dtype], WEIGHT_BITS[setting.scenario.expert_dtype]
    return (plain * weight_bits + matrices * expert_bits) / 8


def rest_weight_bytes(setting: Setting) -> float:
    """Bytes of embedding and head on each GPU, which share the vocabulary, and of the last norm, whole on each."""
    model = setting.model
    tables = model.vocab * model.hidden * (1 if model.tied_embeddings else 2) / setting.deployment.tensor_parallel
    return (tables + model.hidden) * WEIGHT_BITS[setting.scenario.weight_dtype] / 8


def mean_context(scenario: Scenario, window_tokens: int | None) -> float:
    """Tokens that one layer's cache holds for one request, mean over the G steps of its life.

    Returns:
        (1 / G) x sum over j = 1..G of min(P + j, window), in closed form.
    """
    first, last = scenario.prompt_tokens + 1, scenario.total_tokens
    edge = last if window_tokens is None else max(first - 1, min(last, window_tokens))  # contexts up to here grow
    growing = (first + edge) * (edge - first + 1) / 2
    return (growing + (last - edge) * (window_tokens or 0)) / scenario.generated_tokens


def mean_over_life(scenario: Scenario, window_tokens: int | None, seconds: Callable[[float], float]) -> float:
    """Mean of `seconds(context)` over the contexts P+1 .. P+G, which grows up to the window and is constant beyond.

    Gauss-Legendre quadrature below the window, one evaluation beyond: for attention that is linear in the tokens it
    reads, this is the mean over all G contexts exactly.
    """
    first, last = scenario.prompt_tokens + 1, scenario.total_tokens
    edge = last if window_tokens is None else max(first - 1, min(last, window_tokens))
    growing, constant = edge - first + 1, last - edge
    total = 0.0
    if growing:
        total += growing * sum(weight * seconds(first + node * (edge - first)) for node, weight in QUADRATURE)
    if constant:
        total += constant * seconds((edge + 1 + last) / 2)
    return total / scenario.generated_tokens
