"""Exact counts behind the costs: parameters, bytes, cached tokens and distinct experts; no times.

Reads and writes nothing. What tensor parallelism cannot split is counted on every GPU that holds it.

    parameters of a layer    those of `lit_puzzle.costs.model_shape`
    cached tokens            (1 / G) x sum over j = 1..G of min(P + j, window)
    distinct experts         E (1 - (1 - k / E)^B)

Source: arXiv 2602.11937 for windows; MXFP4 stores 32 values of 4 bits with one scale of 8 bits.
Legend: E experts of a layer, k of them per token, B tokens of a step, P prompt tokens, G generated tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.serving import Setting
from lit_puzzle.spec import WEIGHT_BITS, Scenario

# Nodes and weights of Gauss-Legendre quadrature with 3 points on [0, 1]: exact for polynomials of degree 5.
QUADRATURE = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))


def distinct_experts(num_experts: float, experts_per_token: int, tokens: float) -> float:
    """Return the expected number of experts that at least one of `tokens` is routed to, if all are equally likely."""
    if experts_per_token >= num_experts:
        return float(num_experts)
    return -num_experts * math.expm1(tokens * math.log1p(-experts_per_token / num_experts))


def layer_parameters(model: ModelShape, num_experts: int, counted_experts: int) -> int:
    """Return the parameters of one layer with `counted_experts` of its experts; the router counts in full."""
    layer = model.layer
    expert = layer.expert_matrices + layer.expert_split_biases + layer.expert_bias
    shared = layer.query_heads + layer.kv_heads + layer.replicated
    return shared + num_experts * layer.router + counted_experts * expert


def layer_weight_bytes(setting: Setting, num_experts: int) -> float:
    """Return the bytes of one layer's weights on each GPU; `LayerTensors` says what ranks split and what they copy."""
    layer, ranks, groups = setting.model.layer, setting.deployment.tensor_parallel, setting.deployment.expert_parallel
    kv_heads = setting.model.num_kv_heads
    plain = layer.query_heads / ranks + layer.kv_heads // kv_heads * -(-kv_heads // ranks) + layer.replicated
    plain += num_experts * (layer.router + layer.expert_split_biases / ranks + layer.expert_bias / groups)
    matrices = num_experts * layer.expert_matrices / ranks
    weight_bits, expert_bits = WEIGHT_BITS[setting.scenario.weight_dtype], WEIGHT_BITS[setting.scenario.expert_dtype]
    return (plain * weight_bits + matrices * expert_bits) / 8


def rest_weight_bytes(setting: Setting) -> float:
    """Return the bytes of embedding and head on each GPU, split by vocabulary, and of the replicated last norm."""
    model = setting.model
    tables = model.vocab * model.hidden * (1 if model.tied_embeddings else 2) / setting.deployment.tensor_parallel
    return (tables + model.hidden) * WEIGHT_BITS[setting.scenario.weight_dtype] / 8


def mean_context(scenario: Scenario, window_tokens: int | None) -> float:
    """Return the tokens that one layer's cache holds for one request, mean over its G decode steps.

    Returns:
        (1 / G) x sum over j = 1..G of min(P + j, window), in closed form.
    """
    first, last = scenario.prompt_tokens + 1, scenario.total_tokens
    edge = last if window_tokens is None else max(first - 1, min(last, window_tokens))  # contexts up to here grow
    growing = (first + edge) * (edge - first + 1) / 2
    return (growing + (last - edge) * (window_tokens or 0)) / scenario.generated_tokens


def mean_over_steps(scenario: Scenario, window_tokens: int | None, seconds: Callable[[float], float]) -> float:
    """Return the mean of `seconds(context)` over the contexts P+1 .. P+G; seconds are constant beyond the window.

    Gauss-Legendre quadrature below the window and one evaluation beyond it. For attention that is linear in the tokens
    it reads, this is exactly the mean over all G contexts.
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
