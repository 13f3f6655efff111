"""Budgets as limits on sums over layers, each in the unit of its budget.

For R replicas with batch B (requests in flight in each):

    memory          weight bytes + KV bytes of B requests <= usable bytes, per GPU; and of all GPUs <= memory_gib
    throughput      R B G / (B x prefill + G x decode) >= T   <=>   B x prefill + G x decode <= R B G / T
    requests        the same times the length of answers: no sum over layers (`lit_puzzle.search.answer_lengths`)
    latency         B x prefill + G x decode <= latency_seconds
    parameters      total, active; layers with full attention; all independent of the deployment
    expert_parallel candidates whose number of experts it does not divide are forbidden

KV bytes are no sum over layers where the engine pads groups of layers (`lit_puzzle.costs.kv_layout`): they are a table
over how many layers have each window (`lit_puzzle.search.solver.counts`).

Reads and writes nothing.

Source: arXiv 2411.19146 (constraints).
Legend: G generated tokens, T required tokens per second.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lit_puzzle.costs.block_cost import BlockCost, Prediction
from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.engine import GIB
from lit_puzzle.costs.kv_layout import KVDemand, window_counts
from lit_puzzle.costs.serving import Block, Deployment
from lit_puzzle.library.library import Candidate
from lit_puzzle.search.answer_lengths import REQUESTS
from lit_puzzle.search.batches import DeployedBatch
from lit_puzzle.search.solver.choices import Grid, Limit, Option
from lit_puzzle.search.solver.counts import Counts, CountTable, order_of, reachable
from lit_puzzle.spec import Budget, Scenario, Target

Layers = tuple[tuple[Candidate, ...], ...]
GPU_MEMORY, SERVABLE = "memory of each GPU in GiB", "servable"  # keys of limits that hold without any budget
DISTINGUISHING = ("kv_dtype", "weight_dtype", "expert_dtype", "tensor_parallel", "expert_parallel", "batch_size")


def cost_block(candidate: Candidate) -> Block:
    """Return a candidate as far as costs go."""
    return Block(candidate.block.num_experts, candidate.block.window_tokens)


def describe(scenario: Scenario) -> str:
    """Return a scenario in a few words."""
    return f"{scenario.num_gpus} x {scenario.gpu} at {scenario.prompt_tokens} + {scenario.generated_tokens} tokens"


def describe_all(targets: Sequence[Target]) -> list[str]:
    """Return every scenario in a few words; several are numbered, with the keys that distinguish equal descriptions."""
    words = [describe(target.scenario) for target in targets]
    if len(targets) == 1:
        return words
    described = []
    for position, (word, target) in enumerate(zip(words, targets), start=1):
        alike = [other.scenario.to_json() for other, own in zip(targets, words) if own == word]
        own = target.scenario.to_json()
        differ = [f"{name} {own[name]}" for name in DISTINGUISHING if any(other[name] != own[name] for other in alike)]
        described.append(", ".join([f"target {position}: {word}", *differ]))
    return described


def required_throughput(target: Target, parent: Prediction | None) -> tuple[str, float] | None:
    """Return the throughput that a target requires: the budget's key and tokens a second; the larger of two bounds.

    Args:
        target: scenario and budget.
        parent: the parent's best prediction there; None where it does not fit.

    Returns:
        None when the budget has no throughput.

    Raises:
        ValueError: the budget is a multiple of the parent's throughput, and the parent does not fit.
    """
    over_parent, absolute = target.budget.throughput_over_parent, target.budget.throughput_tokens_per_second
    found = [] if absolute is None else [("throughput_tokens_per_second", absolute)]
    if over_parent is not None:
        speed = _speed_of(parent, target, "throughput_over_parent", over_parent)
        found.append(("throughput_over_parent", over_parent * speed))
    return max(found, key=operator.itemgetter(1), default=None)


def _speed_of(parent: Prediction | None, target: Target, key: str, over_parent: float) -> float:
    """Return the parent's tokens a second."""
    if parent is None:
        raise ValueError(
            f"{key}: {over_parent:g} on {describe(target.scenario)}, but the parent does not fit "
            "there at all; give throughput_tokens_per_second instead"
        )
    return parent.tokens_per_second


def grid(
    layers: Layers, model: CostModel, deployment: Deployment, batch: int, value: Callable[[BlockCost], float]
) -> Grid:
    """Return a cost of every candidate; infinite for candidates that cannot be served.

    Args:
        layers: the candidates.
        model: the cost model.
        deployment: how the GPUs share the model.
        batch: requests in flight in each replica.
        value: which number of a block's cost to return.
    """
    ranks = model.scenario.expert_parallel or 1

    def cost(block: Block) -> float:
        if block.num_experts % ranks:
            return math.inf
        return value(model.block(block, deployment, batch))

    blocks = [[cost_block(candidate) for candidate in row] for row in layers]
    costs = {block: cost(block) for block in dict.fromkeys(block for row in blocks for block in row)}
    return tuple(tuple(costs[block] for block in row) for row in blocks)


def kv_tables(layers: Layers, model: CostModel) -> dict[Deployment, KVTable | None]:
    """Return what the KV cache of each GPU takes for every number of layers of each window, by deployment.

    Returns:
        None for each deployment where the bytes are a sum over layers (`ideal`).

    Raises:
        ValueError: there are too many numbers of layers of each window.
    """
    if model.engine.kv.allocator == "ideal":
        return dict.fromkeys(model.deployments())
    counts = reachable(windows_of(layers))
    return {deployment: _kv_table(layers, model, deployment, counts) for deployment in model.deployments()}


def _kv_table(layers: Layers, model: CostModel, deployment: Deployment, counts: Sequence[Counts]) -> KVTable:
    order = order_of(windows_of(layers))
    spread = ((window for window, number in zip(order, key) for _ in range(number)) for key in counts)
    demands = [model.kv_demand(window_counts(windows), deployment) for windows in spread]
    return KVTable(order, dict(zip(counts, demands, strict=True)))


@dataclass(frozen=True)
class KVTable:
    """KV cache of each GPU by the number of layers of each window.

    Attributes:
        order: the windows in the order of the counts.
        demands: bytes for every count.
    """

    order: tuple[int | None, ...]
    demands: Mapping[Counts, KVDemand]

    def gib(self, layers: Layers, batch: int, gpus: int = 1) -> CountTable:
        """Return the table for `batch` requests in flight on that many GPUs, in GiB."""
        values = {key: demand.total(batch) * gpus / GIB for key, demand in self.demands.items()}
        return CountTable(windows_of(layers), self.order, values)


def windows_of(layers: Layers) -> tuple[tuple[int | None, ...], ...]:
    """Return the window of every candidate."""
    return tuple(tuple(candidate.block.window_tokens for candidate in row) for row in layers)


def servable(layers: Layers, models: Sequence[CostModel]) -> list[Limit]:
    """Return the limits that forbid candidates which cannot be served at all."""
    rules: dict[str, Callable[[int], bool]] = {}
    for model in models:
        ranks = model.scenario.expert_parallel or 1
        rules[f"experts divisible by expert_parallel {ranks}"] = partial(_divides, ranks)
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
    """Return the limits on parameters and on layers with full attention; `where` ends their names."""
    deployed = model.deployments()[0], 1  # these costs do not depend on deployment and batch size
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
    kv: KVTable | None,
    batch: DeployedBatch,
) -> Option:
    """Return one deployment and batch size of a target with its limits.

    The limit on requests is that of answers as long as the parent's (`lit_puzzle.search.answer_lengths.by_length`).

    Args:
        layers: the candidates.
        target: scenario and budget.
        model: the cost model of the scenario.
        parent: the parent's best prediction there; None where it does not fit.
        where: the target in words, for messages.
        kv: KV cache in the deployment; None where its bytes are a sum over layers.
        batch: how the GPUs share the model, and requests in flight in each replica.

    Raises:
        ValueError: the budget is a multiple of the parent's throughput or requests, and the parent does not fit.
    """
    deployment, requests = batch
    scenario, budget, rest = target.scenario, target.budget, model.rest(deployment, requests)
    generated, required = scenario.generated_tokens, required_throughput(target, parent)

    def limit(key: str, value: Callable[[BlockCost], float], bound: float, numerator: float | None = None) -> Limit:
        values = grid(layers, model, deployment, requests, value)
        return Limit(f"{key} on {where}", values, value(rest), bound, key, numerator)

    def memory(key: str, gpus: int, bound: float) -> Limit:
        if kv is None:
            return limit(key, lambda cost: (cost.weight_bytes + requests * cost.kv_bytes) * gpus / GIB, bound)
        weights = limit(key, lambda cost: cost.weight_bytes * gpus / GIB, bound)
        return dataclasses.replace(weights, table=kv.gib(layers, requests, gpus))

    def seconds(cost: BlockCost) -> float:
        return requests * cost.prefill_seconds + generated * cost.decode_seconds

    limits = [memory(GPU_MEMORY, 1, model.usable_bytes(deployment) / GIB)]
    if budget.memory_gib is not None:
        limits.append(memory("memory_gib", scenario.num_gpus, budget.memory_gib))
    if required is not None:
        key, throughput = required
        tokens = float(deployment.replicas * requests * generated)
        unit = parent.tokens_per_second if parent is not None and key == "throughput_over_parent" else 1.0
        limits.append(limit(key, seconds, tokens / throughput, tokens / unit))
    if budget.latency_seconds is not None:
        limits.append(limit("latency_seconds", seconds, budget.latency_seconds))
    if (over_parent := budget.requests_over_parent) is not None:
        own = float(deployment.replicas * requests * generated) / _speed_of(parent, target, REQUESTS, over_parent)
        limits.append(limit(REQUESTS, seconds, own / over_parent, own))
    return Option(f"tensor parallel {deployment.tensor_parallel}, batch {requests}", tuple(limits))
