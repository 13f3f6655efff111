"""The exact solver: the plan with the lowest quality loss within all limits, proven, and alternatives to it.

Quality losses are scaled by the largest of those that matter, because HiGHS' tolerances are absolute and would hide
small differences. A candidate that cannot be in a plan as good as the best one known does not matter; as long as
leaving such candidates out makes the largest loss much smaller, the search is run again at the new scale
(`lit_puzzle.search.solver.tree`).

    alternatives    sum_l [x_l = y_l] <= alpha L    against every earlier plan y of L layers

Reads and writes nothing. Memory: 8 bytes x (limits of all options) x (candidates of all layers). Time: one linear
program per option, then a few mixed-integer programs.

Source: arXiv 2411.19146 (mixed-integer program over blocks, alternatives that differ).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from lit_puzzle.search.solver.choices import ChoiceProblem, Limit, OutOfTimeError, Solution
from lit_puzzle.search.solver.extended import extended, extended_limit, extended_plan, restored, table_of
from lit_puzzle.search.solver.infeasible import explain
from lit_puzzle.search.solver.settings import DEFAULT_SETTINGS, NO_EARLIER_PLANS, EarlierPlans, SolverSettings
from lit_puzzle.search.solver.tree import Tree, indicator

MAX_RESCALINGS = 8


def solve(
    problem: ChoiceProblem,
    settings: SolverSettings = DEFAULT_SETTINGS,
    earlier: EarlierPlans = NO_EARLIER_PLANS,
) -> list[Solution]:
    """Solve exactly.

    Args:
        problem: quality losses, limits and options.
        settings: number of plans, alpha, time limit and gap; the other settings are not used.
        earlier: a plan to start from, and plans to differ from.

    Returns:
        Solutions, best first. Fewer than `num_solutions` when no more exist that differ enough, or when the time is up;
        at least one unless `earlier.unlike` has plans.

    Raises:
        InfeasibleError: no plan is within the limits; the message names the tightest one and its cheapest plan.
        OutOfTimeError: no plan was found within the time limit.
        DisagreementError: the solver's totals differ from those of its plan.
    """
    deadline = time.monotonic() + settings.time_limit_seconds
    if problem.labels is not None and not problem.common_labels():
        raise explain(problem)
    stated, found = extended(problem), list[Solution]()
    for _ in range(settings.num_solutions):
        avoided = (*earlier.unlike, *(solution.chosen for solution in found))
        cuts = tuple(_unlike(problem, chosen, settings.alpha) for chosen in avoided)
        tree = Tree(stated, settings.relative_gap, deadline, cuts)
        if earlier.start is not None and not avoided:
            tree.start_from(extended_plan(problem, earlier.start))
        solution, timed_out = _solve_rescaled(tree)
        if solution is not None:
            found.append(restored(problem, solution))
        elif found or (avoided and not timed_out):
            break
        else:
            _refuse(problem, settings, timed_out)
    return found


def _solve_rescaled(tree: Tree) -> tuple[Solution | None, bool]:
    """Solve, then again at a smaller scale while one exists; return the solution and whether the time was up."""
    solution = tree.run()
    for _ in range(MAX_RESCALINGS):
        finer = None if solution is None or tree.timed_out else tree.rescaled()
        if finer is None:
            break
        before, tree = solution, finer
        solution = tree.run()
        assert before is not None and solution is not None  # the tree starts from the plan before
        assert before.bound is not None and solution.bound is not None
        if solution.bound < before.bound <= solution.quality_loss:  # the time was up
            solution = solution.with_bound(before.bound, tree.relative_gap)
    return solution, tree.timed_out


def _refuse(problem: ChoiceProblem, settings: SolverSettings, timed_out: bool) -> None:
    if timed_out:
        raise OutOfTimeError(
            f"No plan was found in {settings.time_limit_seconds:g} seconds, and it is not proven that there is none; "
            "raise solver.time_limit_seconds or list fewer space.batch_sizes."
        )
    raise explain(problem)


def _unlike(problem: ChoiceProblem, chosen: Sequence[int], alpha: float) -> Limit:
    shared = math.floor(alpha * problem.num_layers + 1e-9)  # 0.7 x 10 is 7.000000000000001
    limit = Limit("layers shared with an earlier plan", indicator(problem.quality_loss, chosen), 0.0, float(shared))
    table = table_of(problem)
    return limit if table is None else extended_limit(limit, tuple(table.values))
