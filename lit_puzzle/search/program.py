"""The program of a search: candidates, quality losses, cost models and constraints as a `ChoiceProblem`.

Every budget is a limit on a sum over layers (`lit_puzzle.search.limits`). A deployment and a batch size are one option
of a target; of every target one option must hold. The required throughput is the larger of
`throughput_tokens_per_second` and `throughput_over_parent` x the parent's best throughput in the scenario. Where
requests are bounded, an option also has a length of answers (`lit_puzzle.search.answer_lengths`).

Batch sizes: the scenario's own, else `batch_sizes`, else up to 12 in geometric steps from the largest that fits with
the parent (from 1 where latency is bounded) to the largest that fits with the smallest plan
(`lit_puzzle.search.batches`).

Reads and writes nothing.

Source: arXiv 2411.19146 (constraints, batch sizes swept), arXiv 2602.11937 (two scenarios at once).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_puzzle.costs.block_cost import Prediction
from lit_puzzle.costs.cost_model import CostModel, DoesNotFitError
from lit_puzzle.costs.engine import GIB
from lit_puzzle.costs.kv_layout import KVDemand, window_counts
from lit_puzzle.costs.serving import Block, Deployment
from lit_puzzle.library.library import Library
from lit_puzzle.search.answer_lengths import AnswerLengths, by_length
from lit_puzzle.search.batches import DeployedBatch, ladder
from lit_puzzle.search.limits import (
    KVTable,
    Layers,
    cost_block,
    describe_all,
    grid,
    kv_tables,
    option,
    servable,
    shape_limits,
    windows_of,
)
from lit_puzzle.search.settings import Constraints, SearchSpace, Windows
from lit_puzzle.search.solver.choices import ChoiceProblem, Grid, Option, Traits
from lit_puzzle.spec import Target


@dataclass(frozen=True)
class SearchProgram:
    """A choice problem and what its numbers stand for.

    Attributes:
        problem: the choice problem.
        layers: the candidates of its columns.
        constraints: what the child must reach.
        models: the cost model of every target.
        deployed: deployment and batch size of every option of every target.
        parents: the parent's best prediction per target; None where it does not fit.
        levels: length of answers of every option of every target; 1 where requests are not bounded.
        lengths: changes of answer lengths per target; None where requests are not bounded.
    """

    problem: ChoiceProblem
    layers: Layers
    constraints: Constraints
    models: tuple[CostModel, ...]
    deployed: tuple[tuple[DeployedBatch, ...], ...]
    parents: tuple[Prediction | None, ...]
    levels: tuple[tuple[float, ...], ...]
    lengths: tuple[AnswerLengths | None, ...]

    @property
    def num_tried(self) -> list[int]:
        """Number of deployments and batch sizes of every target."""
        return [len(set(pairs)) for pairs in self.deployed]

    def blocks(self, chosen: Sequence[int]) -> list[Block]:
        """Return the blocks of a plan as far as costs go."""
        return [cost_block(row[index]) for row, index in zip(self.layers, chosen)]


def offered(library: Library, windows: Windows) -> Layers:
    """Return the candidates that may be chosen: all, or with `unchanged` those with the parent's window."""
    if windows == "free":
        return library.layers
    return tuple(
        tuple(candidate for candidate in row if candidate.block.window_tokens == row[0].block.window_tokens)
        for row in library.layers
    )


def build_program(
    layers: Layers,
    quality_loss: Grid,
    models: Sequence[CostModel],
    constraints: Constraints,
    space: SearchSpace,
    tried: Sequence[Sequence[DeployedBatch]] | None = None,
    lengths: Sequence[AnswerLengths | None] | None = None,
) -> SearchProgram:
    """State a search as a choice problem.

    Args:
        layers: candidates, the parent's own first in each layer.
        quality_loss: quality loss of each.
        models: one cost model per target.
        constraints: what the child must reach; its sweep is not used.
        space: whether expert counts are uniform, and batch sizes to try; `layers` already follows its windows.
        tried: deployments and batch sizes of every target; overrides those of `space`.
        lengths: changes of answer lengths of every target that bounds requests.

    Raises:
        ValueError: a throughput is relative to a parent that does not fit.
    """
    lengths = [None] * len(models) if lengths is None else lengths
    parent = [cost_block(row[0]) for row in layers]
    parents = tuple(_best_or_none(model, parent) for model in models)
    always = servable(layers, models) + shape_limits(layers, models[0], constraints.limits, " of limits")
    choices: list[tuple[Option, ...]] = []
    deployed: list[tuple[DeployedBatch, ...]] = []
    levels: list[tuple[float, ...]] = []
    for position, where in enumerate(describe_all(constraints.targets)):
        target, model, best = constraints.targets[position], models[position], parents[position]
        tables = kv_tables(layers, model)
        answers, pairs = lengths[position], _to_try(layers, target, model, space, tables)
        pairs = pairs if tried is None else list(dict.fromkeys(tried[position]))
        always += shape_limits(layers, model, target.budget, f" on {where}")
        options = [option(layers, target, model, best, where, tables[pair[0]], pair) for pair in pairs]
        each = [
            (at_length, pair, level)
            for pair, one in zip(pairs, options, strict=True)
            for at_length, level in by_length(one, answers)
        ]
        choices.append(tuple(one for one, _, _ in each))
        deployed.append(tuple(pair for _, pair, _ in each))
        levels.append(tuple(level for _, _, level in each))
    counts = tuple(tuple(candidate.block.num_experts for candidate in row) for row in layers)
    parameters = grid(layers, models[0], models[0].deployments()[0], 1, lambda cost: cost.parameters)
    problem = ChoiceProblem(
        quality_loss,
        tuple(dict.fromkeys(always)),
        tuple(choices),
        counts if space.uniform_experts else None,
        Traits(counts, windows_of(layers), parameters),
    )
    models, lengths = tuple(models), tuple(lengths)
    return SearchProgram(problem, layers, constraints, models, tuple(deployed), parents, tuple(levels), lengths)


def _best_or_none(model: CostModel, blocks: Sequence[Block]) -> Prediction | None:
    try:
        return model.best(blocks)
    except DoesNotFitError:  # the parent may be too large for the GPUs; the child need not be
        return None


def _to_try(
    layers: Layers, target: Target, model: CostModel, space: SearchSpace, tables: Mapping[Deployment, KVTable | None]
) -> list[DeployedBatch]:
    """Return the deployments and batch sizes to choose from."""
    fixed = target.scenario.batch_size
    if fixed is not None or space.batch_sizes is not None:
        sizes = [fixed] if fixed is not None else sorted(set(space.batch_sizes or ()))
        return [(deployment, size) for deployment in model.deployments() for size in sizes]
    found = [
        (deployment, size)
        for deployment, table in tables.items()
        for size in _ladder(layers, target, model, deployment, table)
    ]
    # Where nothing fits, batch 1 lets the solver's error say how much memory is missing.
    return found or [(deployment, 1) for deployment in model.deployments()]


def _ladder(
    layers: Layers, target: Target, model: CostModel, deployment: Deployment, table: KVTable | None
) -> list[int]:
    weights, caches = (
        grid(layers, model, deployment, 1, value)
        for value in (lambda cost: cost.weight_bytes, lambda cost: cost.kv_bytes)
    )
    own_demand = model.kv_demand(window_counts(row[0].block.window_tokens for row in layers), deployment)
    demands = [KVDemand(sum(map(min, caches)), 0.0)] if table is None else list(table.demands.values())
    room = model.usable_bytes(deployment)
    if target.budget.memory_gib is not None:
        room = min(room, target.budget.memory_gib * GIB / target.scenario.num_gpus)
    room -= model.rest(deployment, 1).weight_bytes

    def fitting(weight: float, demands: Sequence[KVDemand]) -> int:
        return 0 if weight == math.inf else max(demand.requests(room - weight) for demand in demands)

    most = model.max_sequences
    highest = min(most, fitting(sum(map(min, weights)), demands))
    own = min(most, fitting(sum(row[0] for row in weights), [own_demand]))
    lowest = 1 if target.budget.latency_seconds is not None else min(max(1, own), highest)
    return ladder(lowest, highest)
