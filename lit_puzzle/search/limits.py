"""Budgets as bounds on sums over layers: every `Limit` of a search, in the unit that its budget is given in.

For R replicas with batch B (requests in flight in each):

    memory          weight bytes + B x KV bytes <= usable bytes, per GPU; and of all GPUs <= memory_gib
    throughput      R B G / (B x prefill + G x decode) >= T   <=>   B x prefill + G x decode <= R B G / T
    latency         B x prefill + G x decode <= latency_seconds
    parameters      total, active; layers with full attention; all independent of the deployment
    expert_parallel a candidate whose experts it does not divide is forbidden

Source: arXiv 2411.19146 (constraints).
Legend: G generated tokens.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial

from lit_puzzle.costs.cost_model import GIB, Block, BlockCost, CostModel, Deployment, Prediction
from lit_puzzle.library.library import Candidate
from lit_puzzle.search.solver.choices import Grid, Limit, Option
from lit_puzzle.spec import Budget, Scenario, Target

Layers = tuple[tuple[Candidate, ...], ...]
GPU_MEMORY, SERVABLE = "memory of each GPU in GiB", "servable"  # keys of limits that no budget asks for
TOLD_APART = ("kv_dtype", "weight_dtype", "expert_dtype", "tensor_parallel", "expert_parallel", "batch_size")


def cost_block(candidate: Candidate) -> Block:
    """What a candidate is as far as costs go."""
    return Block(candidate.block.num_experts, candidate.block.window_tokens)


def describe(scenario: Scenario) -> str:
    """A scenario in a few words."""
    return f"{scenario.num_gpus} x {scenario.gpu} at {scenario.prompt_tokens} + {scenario.generated_tokens} tokens"


def describe_all(targets: Sequence[Target]) -> list[str]:
    """Every target's scenario in a few words; of several each by its position, and by all that tells equals apart."""
    words = [describe(target.scenario) for target in targets]
    if len(targets) == 1:
        return words
    told = []
    for position, (word, target) in enumerate(zip(words, targets), start=1):
        alike = [other.scenario.to_json() for other, own in zip(targets, words) if own == word]
        own = target.scenario.to_json()
        differ = [f"{name} {own[name]}" for name in TOLD_APART if any(other[name] != own[name] for other in alike)]
        told.append(", ".join([f"target {position}: {word}", *differ]))
    return told


def required_throughput(target: Target, parent: Prediction | None) -> tuple[str, float] | None:
    """What a target asks for: the budget's name and tokens a second; of two bounds the larger.

    Raises:
        ValueError: It asks for a multiple of the parent's, and the parent does not fit.
    """
    over_parent, pairs = target.budget.throughput_over_parent, target.budget.throughput_tokens_per_second
    found = [] if pairs is None else [("throughput_tokens_per_second", pairs)]
    if over_parent is not None:
        if parent is None:
            raise ValueError(
                f"throughput_over_parent: {over_parent:g} on {describe(target.scenario)}, but the parent does not fit "
                "there at all; give throughput_tokens_per_second instead"
            )
        found.append(("throughput_over_parent", over_parent * parent.tokens_per_second))
    return max(found, key=operator.itemgetter(1), default=None)


def grid(
    layers: Layers, model: CostModel, deployment: Deployment, batch: int, value: Callable[[BlockCost], float]
) -> Grid:
    """A cost of every candidate; infinite for what cannot be served."""
    ranks, active = model.scenario.expert_parallel or 1, model.model.experts_per_token

    def cost(block: Block) -> float:
        if block.num_experts % ranks or block.num_experts < active:
            return math.inf
        return value(model.block(block, deployment, batch))

    blocks = [[cost_block(candidate) for candidate in row] for row in layers]
    costs = {block: cost(block) for block in dict.fromkeys(block for row in blocks for block in row)}
    return tuple(tuple(costs[block] for block in row) for row in blocks)


def servable(layers: Layers, models: Sequence[CostModel]) -> list[Limit]:
    """Limits that forbid what cannot be served at all."""
    rules: dict[str, Callable[[int], bool]] = {}
    for model in models:
        ranks, active = model.scenario.expert_parallel or 1, model.model.experts_per_token
        rules[f"experts divisible by expert_parallel {ranks}"] = partial(_divides, ranks)
        rules[f"at least {active} experts, as many as a token takes"] = partial(operator.le, active)
    grids = {
        name: tuple(tuple(0.0 if rule(c.block.num_experts) else math.inf for c in row) for row in layers)
        for name, rule in rules.items()
    }
    return [
        Limit(name, values, 0.0, 0.0, SERVABLE) for name, values in grids.items() if any(math.inf in r for r in values)
    ]


def _divides(ranks: int, count: int) -> bool:
    return count % ranks == 0


def shape_limits(layers: Layers, model: CostModel, budget: Budget, where: str) -> list[Limit]:
    """Bounds on parameters and on layers with full attention."""
    deployed = model.deployments()[0], 1  # none of them depends on it
    rest, found = model.rest(*deployed), []
    if budget.total_parameters is not None:
        values = grid(layers, model, *deployed, lambda cost: cost.parameters)
        key, bound = "total_parameters", float(budget.total_parameters)
        found.append(Limit(key + where, values, float(rest.parameters), bound, key))
    if budget.active_parameters is not None:
        values = grid(layers, model, *deployed, lambda cost: cost.active_parameters)
        key, bound = "active_parameters", float(budget.active_parameters)
        found.append(Limit(key + where, values, float(rest.active_parameters), bound, key))
    if budget.full_attention_layers is not None:
        values = tuple(tuple(float(c.block.window_tokens is None) for c in row) for row in layers)
        key, bound = "full_attention_layers", float(budget.full_attention_layers)
        found.append(Limit(key + where, values, 0.0, bound, key))
    return found


def option(
    layers: Layers,
    target: Target,
    model: CostModel,
    parent: Prediction | None,
    where: str,
    deployment: Deployment,
    batch: int,
) -> Option:
    """One deployment and batch size of a target, with all that bounds it there."""
    scenario, budget, rest = target.scenario, target.budget, model.rest(deployment, batch)
    generated, pairs = scenario.generated_tokens, required_throughput(target, parent)

    def limit(key: str, value: Callable[[BlockCost], float], bound: float, numerator: float | None = None) -> Limit:
        values = grid(layers, model, deployment, batch, value)
        return Limit(f"{key} on {where}", values, value(rest), bound, key, numerator)

    def gib(cost: BlockCost) -> float:
        return (cost.weight_bytes + batch * cost.kv_bytes) / GIB

    def seconds(cost: BlockCost) -> float:
        return batch * cost.prefill_seconds + generated * cost.decode_seconds

    limits = [limit(GPU_MEMORY, gib, model.usable_bytes(deployment) / GIB)]
    if budget.memory_gib is not None:
        limits.append(limit("memory_gib", lambda cost: gib(cost) * scenario.num_gpus, budget.memory_gib))
    if pairs is not None:
        key, throughput = pairs
        tokens = float(deployment.replicas * batch * generated)
        unit = parent.tokens_per_second if parent is not None and key == "throughput_over_parent" else 1.0
        limits.append(limit(key, seconds, tokens / throughput, tokens / unit))
    if budget.latency_seconds is not None:
        limits.append(limit("latency_seconds", seconds, budget.latency_seconds))
    return Option(f"tensor parallel {deployment.tensor_parallel}, batch {batch}", tuple(limits))
