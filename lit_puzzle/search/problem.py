"""A search in words becomes one in numbers: library, damages, cost models and budgets -> `choices.Problem`.

Every budget is a bound on a sum over layers, for R replicas with batch B (requests in flight in each):

    memory          weight bytes + B x KV bytes <= usable bytes, per GPU; and of all GPUs <= memory_gib
    throughput      R B G / (B x prefill + G x decode) >= T   <=>   B x prefill + G x decode <= R B G / T
    latency         B x prefill + G x decode <= latency_seconds
    parameters      total, active; layers with full attention; all independent of the deployment
    expert_parallel a candidate whose experts it does not divide is forbidden

A deployment and a batch make one option of a target; of every target one option must hold. T is the larger of
`throughput_tokens_per_second` and `throughput_over_parent` x the parent's best throughput in the scenario.

Batches: the scenario's own, else `batch_sizes`, else up to 12 in geometric steps from the parent's memory-limited batch
(from 1 where latency is bounded) to that of the smallest plan (`lit_puzzle.search.solver.batches`).

Source: arXiv 2411.19146 (constraints, batch sizes swept), arXiv 2602.11937 (two scenarios at once).
Legend: G generated tokens.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from lit_puzzle.search.cost import GIB, Block, BlockCost, CostModel, Deployment, Prediction
from lit_puzzle.search.library import Candidate, Library
from lit_puzzle.search.solver.batches import Pairs, ladder
from lit_puzzle.search.solver.choices import Grid, Limit, Option, Problem, Traits
from lit_puzzle.spec import Budget, Scenario, Target

Layers = tuple[tuple[Candidate, ...], ...]
Windows = Literal["free", "unchanged"]


@dataclass(frozen=True)
class Search:
    """A problem and what its numbers stand for.

    Attributes:
        problem: The numbers.
        layers: The candidates that its columns are.
        targets: What the child must reach.
        models: The cost model of every target.
        deployed: For every target and option: deployment and batch size.
        parents: The parent's best prediction per target; None where it does not fit.
    """

    problem: Problem
    layers: Layers
    targets: tuple[Target, ...]
    models: tuple[CostModel, ...]
    deployed: tuple[tuple[tuple[Deployment, int], ...], ...]
    parents: tuple[Prediction | None, ...]

    def blocks(self, chosen: Sequence[int]) -> list[Block]:
        """The blocks of a plan, as costs see them."""
        return [cost_block(row[index]) for row, index in zip(self.layers, chosen)]


def cost_block(candidate: Candidate) -> Block:
    """What a candidate is as far as costs go."""
    return Block(candidate.block.num_experts, candidate.block.window_tokens)


def offered(library: Library, windows: Windows) -> Layers:
    """The candidates that may be chosen; `unchanged` leaves every layer the parent's window."""
    if windows == "free":
        return library.layers
    return tuple(
        tuple(candidate for candidate in row if candidate.block.window_tokens == row[0].block.window_tokens)
        for row in library.layers
    )


def describe(scenario: Scenario) -> str:
    """A scenario in a few words."""
    return f"{scenario.num_gpus} x {scenario.gpu} at {scenario.prompt_tokens} + {scenario.generated_tokens} tokens"


def write_problem(
    layers: Layers,
    damage: Grid,
    targets: Sequence[Target],
    models: Sequence[CostModel],
    limits: Budget,
    uniform_experts: bool = False,
    batch_sizes: Sequence[int] | None = None,
    tried: Sequence[Pairs] | None = None,
) -> Search:
    """Put everything in numbers.

    Args:
        layers: Candidates, the parent's own first in each layer.
        damage: Damage of each.
        targets: What the child must reach.
        models: One cost model per target.
        limits: Bounds that no deployment changes: parameters and full-attention layers.
        uniform_experts: Take the same number of experts in every layer.
        batch_sizes: Batches to try where a scenario names none; None makes a ladder.
        tried: Deployments and batches of every target; overrides `batch_sizes`.

    Raises:
        ValueError: No target, a bound in the wrong place, or a throughput relative to a parent that does not fit.
    """
    _check(targets, limits, batch_sizes)
    parent = [cost_block(row[0]) for row in layers]
    parents = tuple(_best_or_none(model, parent) for model in models)
    always = [*_servable(layers, models)]
    for budget in (limits, *(target.budget for target in targets)):
        always += _shape_limits(layers, models[0], budget)
    choices, deployed = [], []
    for position, (target, model, best) in enumerate(zip(targets, models, parents, strict=True)):
        pairs = _pairs(layers, target, model, batch_sizes) if tried is None else tried[position]
        throughput = required_throughput(target, best)
        choices.append(tuple(_option(layers, target, model, throughput, *pair) for pair in pairs))
        deployed.append(tuple(pairs))
    counts = tuple(tuple(candidate.block.num_experts for candidate in row) for row in layers)
    windows = tuple(tuple(candidate.block.window_tokens for candidate in row) for row in layers)
    parameters = _grid(layers, models[0], *_any_deployment(models[0]), lambda cost: cost.parameters)
    numbers = Problem(
        damage,
        tuple(dict.fromkeys(always)),
        tuple(choices),
        counts if uniform_experts else None,
        Traits(counts, windows, parameters),
    )
    return Search(numbers, layers, tuple(targets), tuple(models), tuple(deployed), parents)


def _check(targets: Sequence[Target], limits: Budget, batch_sizes: Sequence[int] | None) -> None:
    if not targets:
        raise ValueError(
            "targets is empty; name at least one scenario (its budget may be empty: then it must only fit)"
        )
    served = ("memory_gib", "throughput_tokens_per_second", "throughput_over_parent", "latency_seconds")
    misplaced = [name for name in served if limits.to_json()[name] is not None]
    if misplaced:
        raise ValueError(f"limits: {misplaced} depend on a deployment; put them into the budget of a target")
    if batch_sizes is not None and (not batch_sizes or any(size < 1 for size in batch_sizes)):
        raise ValueError(f"batch_sizes must be whole numbers of at least 1, got {list(batch_sizes)}")


def _best_or_none(model: CostModel, blocks: Sequence[Block]) -> Prediction | None:
    try:
        return model.best(blocks)
    except ValueError:  # the parent may be too large for the GPUs: that is what a child is made for
        return None


def required_throughput(target: Target, parent: Prediction | None) -> float | None:
    """Tokens a second that a target asks for: the larger of its two bounds.

    Raises:
        ValueError: It asks for a multiple of the parent's, and the parent does not fit.
    """
    over_parent, asked = target.budget.throughput_over_parent, target.budget.throughput_tokens_per_second
    if over_parent is None:
        return asked
    if parent is None:
        raise ValueError(
            f"throughput_over_parent: {over_parent:g} on {describe(target.scenario)}, but the parent does not fit "
            "there at all; give throughput_tokens_per_second instead"
        )
    return max(over_parent * parent.tokens_per_second, asked or 0.0)


def _servable(layers: Layers, models: Sequence[CostModel]) -> list[Limit]:
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
    return [Limit(name, grid, 0.0, 0.0) for name, grid in grids.items() if any(math.inf in row for row in grid)]


def _divides(ranks: int, count: int) -> bool:
    return count % ranks == 0


def _any_deployment(model: CostModel) -> tuple[Deployment, int]:
    return model.deployments()[0], 1


def _shape_limits(layers: Layers, model: CostModel, budget: Budget) -> list[Limit]:
    """Bounds on parameters and on layers with full attention."""
    deployed = _any_deployment(model)
    rest, found = model.rest(*deployed), []
    if budget.total_parameters is not None:
        grid = _grid(layers, model, *deployed, lambda cost: cost.parameters / 1e9)
        found.append(Limit("total parameters (billions)", grid, rest.parameters / 1e9, budget.total_parameters / 1e9))
    if budget.active_parameters is not None:
        grid = _grid(layers, model, *deployed, lambda cost: cost.active_parameters / 1e9)
        bound = budget.active_parameters / 1e9
        found.append(Limit("active parameters (billions)", grid, rest.active_parameters / 1e9, bound))
    if budget.full_attention_layers is not None:
        grid = tuple(tuple(float(c.block.window_tokens is None) for c in row) for row in layers)
        found.append(Limit("layers with full attention", grid, 0.0, float(budget.full_attention_layers)))
    return found


def _grid(
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


def _option(
    layers: Layers, target: Target, model: CostModel, throughput: float | None, deployment: Deployment, batch: int
) -> Option:
    scenario, budget, rest = target.scenario, target.budget, model.rest(deployment, batch)
    where, generated = describe(scenario), scenario.generated_tokens

    def limit(name: str, value: Callable[[BlockCost], float], bound: float) -> Limit:
        return Limit(f"{name} on {where}", _grid(layers, model, deployment, batch, value), value(rest), bound)

    def gib(cost: BlockCost) -> float:
        return (cost.weight_bytes + batch * cost.kv_bytes) / GIB

    def seconds(cost: BlockCost) -> float:
        return batch * cost.prefill_seconds + generated * cost.decode_seconds

    limits = [limit("GiB of each GPU", gib, model.usable_bytes(deployment) / GIB)]
    if budget.memory_gib is not None:
        limits.append(limit("GiB of all GPUs", lambda cost: gib(cost) * scenario.num_gpus, budget.memory_gib))
    if throughput is not None:
        name = f"seconds of a request at {throughput:.6g} tokens/s"
        limits.append(limit(name, seconds, deployment.replicas * batch * generated / throughput))
    if budget.latency_seconds is not None:
        limits.append(limit("latency in seconds", seconds, budget.latency_seconds))
    return Option(f"tensor parallel {deployment.tensor_parallel}, batch {batch}", tuple(limits))


def _pairs(
    layers: Layers, target: Target, model: CostModel, batch_sizes: Sequence[int] | None
) -> list[tuple[Deployment, int]]:
    """Deployments and batch sizes to choose from."""
    fixed = target.scenario.batch_size
    if fixed is not None or batch_sizes is not None:
        sizes = [fixed] if fixed is not None else sorted(set(batch_sizes or ()))
        return [(deployment, size) for deployment in model.deployments() for size in sizes]
    found = [
        (deployment, size) for deployment in model.deployments() for size in _ladder(layers, target, model, deployment)
    ]
    # Where nothing fits, the search itself shall say how much memory is missing.
    return found or [(deployment, 1) for deployment in model.deployments()]


def _ladder(layers: Layers, target: Target, model: CostModel, deployment: Deployment) -> list[int]:
    weights = _grid(layers, model, deployment, 1, lambda cost: cost.weight_bytes)
    caches = _grid(layers, model, deployment, 1, lambda cost: cost.kv_bytes)
    room = model.usable_bytes(deployment)
    if target.budget.memory_gib is not None:
        room = min(room, target.budget.memory_gib * GIB / target.scenario.num_gpus)
    room -= model.rest(deployment, 1).weight_bytes

    def fitting(weight: float, cache: float) -> int:
        return min(model.engine.max_sequences, math.floor((room - weight) / cache)) if room > weight < math.inf else 0

    highest = fitting(sum(map(min, weights)), sum(map(min, caches)))
    own = fitting(sum(row[0] for row in weights), sum(row[0] for row in caches))
    lowest = 1 if target.budget.latency_seconds is not None else min(max(1, own), highest)
    return ladder(lowest, highest)
