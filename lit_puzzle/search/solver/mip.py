"""The least damaging plan within all limits, proven, and the next best ones that differ from it.

Damages are scaled by the largest of those that matter, or the tolerances of the solver would hide differences: whatever
cannot be in a plan as good as the best one known is left out, and as long as that makes the largest damage left much
smaller the search is run once more (`lit_puzzle.search.solver.tree`).

Later solutions differ: sum_l x_l y_l <= alpha L against every plan y before (arXiv 2411.19146).

Memory: 8 bytes x (limits of all options) x (candidates of all layers). Time: 1 linear program per option, then few.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from lit_puzzle.search.solver.choices import ChoiceProblem, Limit, OutOfTimeError, Settings, Solution
from lit_puzzle.search.solver.infeasible import explain
from lit_puzzle.search.solver.tree import Tree, indicator

MOST_SCALES = 8


def solve(problem: ChoiceProblem, settings: Settings = Settings()) -> list[Solution]:  # noqa: B008  (frozen)
    """Solve exactly.

    Args:
        problem: Damages, limits and options.
        settings: Number of plans, alpha, time limit, gap.

    Returns:
        Solutions, best first; fewer than asked for when no more exist that are different enough, or when the time was
        up. At least one, unless they must be unlike given plans.

    Raises:
        Infeasible: No plan is within the limits: names the tightest one and what the cheapest plan needs.
        OutOfTimeError: No plan was found in the time given.
        DisagreementError: Totals do not add up.
    """
    deadline = time.monotonic() + settings.time_limit_seconds
    found: list[Solution] = []
    for _ in range(settings.num_solutions):
        earlier = (*settings.unlike, *(solution.chosen for solution in found))
        cuts = tuple(_unlike(problem, chosen, settings.alpha) for chosen in earlier)
        tree = Tree(problem, settings.relative_gap, deadline, cuts)
        if settings.known is not None and not earlier:
            tree.start_from(settings.known)
        solution, timed_out = _at_its_own_scale(tree)
        if solution is not None:
            found.append(solution)
        elif found or (earlier and not timed_out):
            break
        else:
            _refuse(problem, settings, timed_out)
    return found


def _at_its_own_scale(tree: Tree) -> tuple[Solution | None, bool]:
    """Solve, and again without what cannot be as good as the plan found while the largest damage left gets smaller."""
    solution = tree.run()
    for _ in range(MOST_SCALES):
        closer = None if solution is None or tree.timed_out else tree.closer()
        if closer is None:
            break
        before, tree = solution, closer
        solution = tree.run()
        assert before is not None and solution is not None  # it starts from the plan before
        assert before.bound is not None and solution.bound is not None
        if solution.bound < before.bound <= solution.quality_loss:  # the time was up
            solution = solution.with_bound(before.bound, tree.relative_gap)
    return solution, tree.timed_out


def _refuse(problem: ChoiceProblem, settings: Settings, timed_out: bool) -> None:
    if timed_out:
        raise OutOfTimeError(
            f"No plan was found in {settings.time_limit_seconds:g} seconds, and none was ruled out; "
            "raise time_limit_seconds or give fewer batch_sizes."
        )
    raise explain(problem)


def _unlike(problem: ChoiceProblem, chosen: Sequence[int], alpha: float) -> Limit:
    shared = math.floor(alpha * problem.num_layers + 1e-9)  # 0.7 x 10 is 7.000000000000001
    return Limit("unlike an earlier plan", indicator(problem.quality_loss, chosen), 0.0, float(shared))
