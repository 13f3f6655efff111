"""A search in words becomes one in numbers: library, damages, cost models and budgets -> `choices.ChoiceProblem`.

Every budget is a bound on a sum over layers (`lit_puzzle.search.limits`). A deployment and a batch make one option of a
target; of every target one option must hold. The throughput asked for is the larger of `throughput_tokens_per_second`
and `throughput_over_parent` x the parent's best throughput in the scenario.

Batches: the scenario's own, else `batch_sizes`, else up to 12 in geometric steps from the parent's memory-limited batch
(from 1 where latency is bounded) to that of the smallest plan (`lit_puzzle.search.solver.batches`).

Source: arXiv 2411.19146 (constraints, batch sizes swept), arXiv 2602.11937 (two scenarios at once).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lit_puzzle.costs.cost_model import GIB, Block, CostModel, Deployment, DoesNotFit, Prediction
from lit_puzzle.library.library import Library
from lit_puzzle.search.limits import Layers, cost_block, describe_all, grid, option, servable, shape_limits
from lit_puzzle.search.solver.batches import Pairs, ladder
from lit_puzzle.search.solver.choices import ChoiceProblem, Grid, Traits
from lit_puzzle.spec import Budget, Target

Windows = Literal["free", "unchanged"]


@dataclass(frozen=True)
class SearchProgram:
    """A problem and what its numbers stand for.

    Attributes:
        problem: The numbers.
        layers: The candidates that its columns are.
        targets: What the child must reach.
        models: The cost model of every target.
        deployed: For every target and option: deployment and batch size.
        parents: The parent's best prediction per target; None where it does not fit.
        limits: Bounds that no deployment changes.
    """

    problem: ChoiceProblem
    layers: Layers
    targets: tuple[Target, ...]
    models: tuple[CostModel, ...]
    deployed: tuple[tuple[tuple[Deployment, int], ...], ...]
    parents: tuple[Prediction | None, ...]
    limits: Budget

    def blocks(self, chosen: Sequence[int]) -> list[Block]:
        """The blocks of a plan, as costs see them."""
        return [cost_block(row[index]) for row, index in zip(self.layers, chosen)]


def offered(library: Library, windows: Windows) -> Layers:
    """The candidates that may be chosen; `unchanged` leaves every layer the parent's window."""
    if windows == "free":
        return library.layers
    return tuple(
        tuple(candidate for candidate in row if candidate.block.window_tokens == row[0].block.window_tokens)
        for row in library.layers
    )


def write_program(
    layers: Layers,
    quality_loss: Grid,
    targets: Sequence[Target],
    models: Sequence[CostModel],
    limits: Budget,
    uniform_experts: bool = False,
    batch_sizes: Sequence[int] | None = None,
    tried: Sequence[Pairs] | None = None,
) -> SearchProgram:
    """Put everything in numbers.

    Args:
        layers: Candidates, the parent's own first in each layer.
        quality_loss: Quality loss of each.
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
    always = servable(layers, models) + shape_limits(layers, models[0], limits, " of limits")
    choices, deployed = [], []
    for position, where in enumerate(describe_all(targets)):
        target, model, best = targets[position], models[position], parents[position]
        pairs = _pairs(layers, target, model, batch_sizes) if tried is None else tried[position]
        always += shape_limits(layers, model, target.budget, f" on {where}")
        choices.append(tuple(option(layers, target, model, best, where, *pair) for pair in pairs))
        deployed.append(tuple(pairs))
    counts = tuple(tuple(candidate.block.num_experts for candidate in row) for row in layers)
    windows = tuple(tuple(candidate.block.window_tokens for candidate in row) for row in layers)
    parameters = grid(layers, models[0], models[0].deployments()[0], 1, lambda cost: cost.parameters)
    numbers = ChoiceProblem(
        quality_loss,
        tuple(dict.fromkeys(always)),
        tuple(choices),
        counts if uniform_experts else None,
        Traits(counts, windows, parameters),
    )
    return SearchProgram(numbers, layers, tuple(targets), tuple(models), tuple(deployed), parents, limits)


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
    except DoesNotFit:  # the parent may be too large for the GPUs: that is what a child is made for
        return None


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
    weights = grid(layers, model, deployment, 1, lambda cost: cost.weight_bytes)
    caches = grid(layers, model, deployment, 1, lambda cost: cost.kv_bytes)
    room = model.usable_bytes(deployment)
    if target.budget.memory_gib is not None:
        room = min(room, target.budget.memory_gib * GIB / target.scenario.num_gpus)
    room -= model.rest(deployment, 1).weight_bytes

    def fitting(weight: float, cache: float) -> int:
        return min(model.max_sequences, math.floor((room - weight) / cache)) if room > weight < math.inf else 0

    highest = fitting(sum(map(min, weights)), sum(map(min, caches)))
    own = fitting(sum(row[0] for row in weights), sum(row[0] for row in caches))
    lowest = 1 if target.budget.latency_seconds is not None else min(max(1, own), highest)
    return ladder(lowest, highest)
