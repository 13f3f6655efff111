"""From a program to plans: solve, refine the batch sizes around the chosen ones, find alternatives, sweep a budget.

The best plan comes first and has the whole time limit: first over the ladder of batch sizes, then over finer ones
around those it chose, as long as that finds a better plan. Alternatives are searched afterwards over all deployments
and batch sizes tried before, with a time limit of their own; a sweep has another one. Neither can change the best plan
or its proof, which holds for the deployments and batch sizes tried.

Reads and writes nothing.

Source: arXiv 2411.19146 (alternatives that differ, one program per batch size).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

from lit_puzzle.costs.block_cost import Prediction
from lit_puzzle.search.batches import DeployedBatch, finer
from lit_puzzle.search.limits import describe_all
from lit_puzzle.search.plan_record import check_totals
from lit_puzzle.search.program import SearchProgram
from lit_puzzle.search.report import SweepPoint
from lit_puzzle.search.solver import solvers
from lit_puzzle.search.solver.choices import InfeasibleError, OutOfTimeError, Solution
from lit_puzzle.search.solver.settings import EarlierPlans, SolverSettings

# Builds the program with the ladder of batch sizes, or with the deployments and batch sizes of `tried=`.
ProgramBuilder = Callable[..., SearchProgram]
SHORTEST_SECONDS = 1e-3  # time limit of a solver when no time is left


def solve(
    build: ProgramBuilder, program: SearchProgram, settings: SolverSettings
) -> tuple[SearchProgram, list[Solution]]:
    """Find the best plan and its alternatives.

    Args:
        build: builds the program with other deployments and batch sizes.
        program: the program with those to try first.
        settings: settings of the solver.

    Returns:
        The program with all deployments and batch sizes that were tried, and the plans, best first.

    Raises:
        InfeasibleError: no plan was found; the message says what the nearest plan reaches in every target.
        OutOfTimeError: no plan was found within the time limit.
        DisagreementError: the solver's totals differ from those of the cost model.
    """
    program, best = solve_best(build, program, settings)
    alternatives = _alternatives(program, best, settings)
    for solution in alternatives:
        check_totals(program, solution)
    return program, [best, *alternatives]


def solve_best(
    build: ProgramBuilder, program: SearchProgram, settings: SolverSettings
) -> tuple[SearchProgram, Solution]:
    """Find the best plan alone; see `solve`."""
    deadline = time.monotonic() + settings.time_limit_seconds
    # A heuristic refuses more than one plan itself.
    one_plan = dataclasses.replace(settings, num_solutions=1) if settings.name in solvers.EXACT else settings
    try:
        best = solvers.solve(program.problem, one_plan)[0]
    except InfeasibleError as error:
        raise with_predictions(program, error) from error
    while settings.refine and (tried := finer(program.deployed, best.options)) is not None:
        left = max(SHORTEST_SECONDS, deadline - time.monotonic())
        refined, again = build(tried=tried), dataclasses.replace(one_plan, time_limit_seconds=left)
        try:
            found = solvers.solve(refined.problem, again, EarlierPlans(start=best.chosen))[0]
        except (InfeasibleError, OutOfTimeError):  # a heuristic found nothing, or no time was left: keep the plan
            break
        better = found.quality_loss < best.quality_loss
        if better or (found.proven and best.proven):  # otherwise the time was up: keep the bound that is known
            program, best = _merged(build, program, refined, best, found, settings.relative_gap)
        if not better:
            break
    check_totals(program, best)
    return program, best


def _alternatives(program: SearchProgram, best: Solution, settings: SolverSettings) -> list[Solution]:
    """Return later plans over everything tried, as many as are found in time."""
    if settings.num_solutions == 1 or settings.name not in solvers.EXACT:
        return []
    more = dataclasses.replace(settings, num_solutions=settings.num_solutions - 1)
    try:
        return solvers.solve(program.problem, more, EarlierPlans(unlike=(best.chosen,)))
    except OutOfTimeError:
        print(f"solver {settings.name}: no alternative was found in {more.time_limit_seconds:g} s", flush=True)
        return []


def sweep(builders: Sequence[tuple[float, ProgramBuilder]], settings: SolverSettings) -> list[SweepPoint]:
    """Find the lowest quality loss for every budget, in the given order.

    Args:
        builders: the throughput relative to the parent's, and what builds the program with it.
        settings: settings of the solver; each budget gets an equal share of the time left of the sweep's limit.
    """
    deadline, points = time.monotonic() + settings.sweep_time_limit_seconds, []
    for position, (over_parent, build) in enumerate(builders):
        left = max(SHORTEST_SECONDS, (deadline - time.monotonic()) / (len(builders) - position))
        limited = dataclasses.replace(settings, num_solutions=1, time_limit_seconds=left)
        try:
            _, best = solve_best(build, build(), limited)
        except InfeasibleError as error:
            points.append(SweepPoint(over_parent, None, error.proven))
        except OutOfTimeError:
            points.append(SweepPoint(over_parent, None, False))
        else:
            points.append(SweepPoint(over_parent, best.quality_loss, best.proven))
    return points


def _merged(
    build: ProgramBuilder,
    before: SearchProgram,
    after: SearchProgram,
    best: Solution,
    found: Solution,
    relative_gap: float,
) -> tuple[SearchProgram, Solution]:
    """Return one program with all that both tried, and the better of their plans with the bound that holds there."""
    tried: list[list[DeployedBatch]] = [
        [*old, *(pair for pair in new if pair not in old)] for old, new in zip(before.deployed, after.deployed)
    ]
    merged, plan, source = build(tried=tried), best, before
    if found.quality_loss < best.quality_loss:
        plan, source = found, after
    options = (list(zip(*each)) for each in zip(merged.deployed, merged.levels))
    taken = ((pairs[index], of[index]) for pairs, of, index in zip(source.deployed, source.levels, plan.options))
    plan = dataclasses.replace(plan, options=tuple(pairs.index(one) for pairs, one in zip(options, taken)))
    if best.bound is None or found.bound is None:
        return merged, plan
    # The first bound holds for the first program only: once its plan is beaten, it may be above the new quality loss.
    return merged, plan.with_bound(min(best.bound, found.bound, plan.quality_loss), relative_gap)


def with_predictions(program: SearchProgram, error: InfeasibleError) -> InfeasibleError:
    """Return the error with what its plan would reach in every target."""
    if error.chosen is None:
        return error
    blocks = program.blocks(error.chosen)
    lines = [str(error), "In the nearest deployment and batch size that plan reaches:"]
    for position, where in enumerate(describe_all(program.constraints.targets)):
        model, parent = program.models[position], program.parents[position]
        excess = [
            max((limit.excess(error.chosen) for limit in option.limits), default=0.0)
            for option in program.problem.choices[position]
        ]
        if min(excess) == math.inf:
            lines.append(f"- {where}: it cannot be served")
            continue
        nearest = program.deployed[position][excess.index(min(excess))]
        lines.append(f"- {where}: {_speed(model.predict(blocks, *nearest), parent)}")
    names = [row[index].name for row, index in zip(program.layers, error.chosen)]
    lines.append(f"Its candidates, layer by layer: {names}")
    return InfeasibleError("\n".join(lines), error.chosen, error.options, error.needs, error.proven)


def _speed(child: Prediction, parent: Prediction | None) -> str:
    over = "" if parent is None else f", {child.tokens_per_second / parent.tokens_per_second:.3g}x the parent"
    return (
        f"{child.tokens_per_second:.6g} tokens/s{over}, {child.memory_gib:.4g} GiB, {child.latency_seconds:.4g} s per "
        f"request (tensor parallel {child.deployment.tensor_parallel}, batch {child.batch_size})"
    )
