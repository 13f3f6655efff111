"""The solvers by the names that recipes use.

Exact solvers prove their optimum, give alternatives and can start from a known plan; heuristics give one plan without a
bound.
"""

from __future__ import annotations

from collections.abc import Callable

from lit_puzzle.search.solver import baselines, mip
from lit_puzzle.search.solver.choices import ChoiceProblem, Solution
from lit_puzzle.search.solver.settings import NO_EARLIER_PLANS, EarlierPlans, SolverSettings

EXACT: dict[str, Callable[[ChoiceProblem, SolverSettings, EarlierPlans], list[Solution]]] = {
    "mip": mip.solve,
    "max_parameters": baselines.max_parameters,
}
HEURISTICS: dict[str, Callable[[ChoiceProblem, SolverSettings], list[Solution]]] = {
    "greedy": baselines.greedy,
    "uniform": baselines.uniform,
    "random": baselines.random,
}


def solve(problem: ChoiceProblem, settings: SolverSettings, earlier: EarlierPlans = NO_EARLIER_PLANS) -> list[Solution]:
    """Solve with the solver that the settings name.

    Args:
        problem: quality losses, limits and options.
        settings: settings of the solver.
        earlier: plans found before; heuristics do not use them.

    Returns:
        Solutions, best first.

    Raises:
        InfeasibleError: no plan was found within the limits.
        OutOfTimeError: an exact solver found no plan within the time limit.
        ValueError: a heuristic is asked for more than one plan.
    """
    if settings.name in EXACT:
        return EXACT[settings.name](problem, settings, earlier)
    return HEURISTICS[settings.name](problem, settings)
