"""Baselines to compare the exact search with.

- greedy: start from the parent; while a limit is exceeded, take the replacement with the largest saving per quality
  loss in the limit that is exceeded most; a candidate that was replaced is not taken again.
- uniform: the same expert count in every layer and the same window in every layer that offers it; the plan with the
  lowest quality loss of those within the limits.
- random: a plan drawn uniformly; while a limit is exceeded, a random layer changes to a random candidate that costs
  less in the limit that is exceeded most. Seeded.
- max_parameters: the plan with the most parameters within the limits, whatever its quality loss (exact, by the same
  solver).

Of the options of a scenario each baseline uses the one that the current plan exceeds least. `InfeasibleError` means
that no plan was found; only `max_parameters` proves that there is none.

Reads and writes nothing.

Source: arXiv 2411.19146 compares its search with greedy choice and with maximal parameters.
"""

from __future__ import annotations

import itertools
import math
import random as random_module
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from lit_puzzle.search.solver import mip
from lit_puzzle.search.solver.choices import ChoiceProblem, InfeasibleError, Limit, Solution, Traits
from lit_puzzle.search.solver.settings import DEFAULT_SETTINGS, NO_EARLIER_PLANS, EarlierPlans, SolverSettings

RESTARTS = 100


def greedy(problem: ChoiceProblem, settings: SolverSettings = DEFAULT_SETTINGS) -> list[Solution]:
    """Solve by the largest saving per quality loss; see the module's docstring.

    Raises:
        InfeasibleError: no replacement is left that saves anything.
        ValueError: `num_solutions` is above 1.
    """
    _one_only("greedy", settings)
    plans = (_greedy(problem, label) for label in problem.common_labels() or [None])
    return _best("greedy", problem, (plan for plan in plans if plan is not None))


def _greedy(problem: ChoiceProblem, label: Hashable) -> list[int] | None:
    allowed = _allowed(problem, label)
    chosen = [
        min(row, key=lambda i: (i != 0, quality_loss[i])) for row, quality_loss in zip(allowed, problem.quality_loss)
    ]
    while (limit := _exceeded_most(problem, chosen)) is not None:
        moves = [
            (_merit(saving, problem.quality_loss[layer], chosen[layer], index), layer, index)
            for layer, row in enumerate(allowed)
            for index in row
            if (saving := -limit.change(chosen, layer, index)) > 0
        ]
        if not moves:
            return None
        _, layer, index = max(moves)
        allowed[layer].remove(chosen[layer])
        chosen[layer] = index
    return chosen


def _merit(saving: float, quality_losses: Sequence[float], now: int, then: int) -> tuple[float, float]:
    """Return the saving per quality loss; a replacement without further loss is better than any with."""
    loss = quality_losses[then] - quality_losses[now]
    return (math.inf, saving) if loss <= 0 else (saving / loss, saving)


def uniform(problem: ChoiceProblem, settings: SolverSettings = DEFAULT_SETTINGS) -> list[Solution]:
    """Solve with equal layers; see the module's docstring.

    Raises:
        InfeasibleError: no uniform plan is within the limits.
        ValueError: `num_solutions` is above 1, or the problem has no traits.
    """
    _one_only("uniform", settings)
    return _best("uniform", problem, _uniform_plans(_traits(problem)))


def _uniform_plans(traits: Traits) -> Iterator[list[int]]:
    counts = sorted({count for row in traits.experts for count in row}, reverse=True)
    windows = {window for row in traits.windows for window in row if window is not None}
    for count, window in itertools.product(counts, [None, *sorted(windows, reverse=True)]):
        plan = []
        for experts, offered in zip(traits.experts, traits.windows):
            own = offered[0]  # the parent's; None in `window` leaves every layer its own
            wanted = window if window is not None and window in offered else own
            plan += [i for i, kind in enumerate(zip(experts, offered)) if kind == (count, wanted)][:1]
        if len(plan) == len(traits.experts):
            yield plan


def random(problem: ChoiceProblem, settings: SolverSettings = DEFAULT_SETTINGS) -> list[Solution]:
    """Draw a plan and change it until it is within the limits; see the module's docstring.

    Raises:
        InfeasibleError: none of 100 draws came within the limits.
        ValueError: `num_solutions` is above 1.
    """
    _one_only("random", settings)
    generator = random_module.Random(settings.seed)
    for _ in range(RESTARTS):
        allowed = _allowed(problem, generator.choice(problem.common_labels() or [None]))
        chosen = [generator.choice(row) for row in allowed]
        if _repair(problem, allowed, chosen, generator):
            return _best("random", problem, [chosen])
    return _best("random", problem, [])


def _repair(
    problem: ChoiceProblem, allowed: list[list[int]], chosen: list[int], generator: random_module.Random
) -> bool:
    for _ in range(10 * sum(len(row) for row in allowed)):
        limit = _exceeded_most(problem, chosen)
        if limit is None:
            return True
        cheaper = [
            (layer, index)
            for layer, row in enumerate(allowed)
            for index in row
            if limit.change(chosen, layer, index) < 0
        ]
        if not cheaper:
            return False
        layer = generator.choice(sorted({layer for layer, _ in cheaper}))
        chosen[layer] = generator.choice([index for other, index in cheaper if other == layer])
    return False


def max_parameters(
    problem: ChoiceProblem, settings: SolverSettings = DEFAULT_SETTINGS, earlier: EarlierPlans = NO_EARLIER_PLANS
) -> list[Solution]:
    """Maximize the number of parameters; see the module's docstring.

    Raises:
        InfeasibleError: there is no plan within the limits.
        OutOfTimeError: no plan was found within the time limit.
        ValueError: the problem has no traits.
    """
    negated = tuple(tuple(-float(count) for count in row) for row in _traits(problem).parameters)
    found = mip.solve(replace(problem, quality_loss=negated), settings, earlier)
    return [Solution(s.chosen, problem.total_quality_loss(s.chosen), s.options) for s in found]


def _traits(problem: ChoiceProblem) -> Traits:
    if problem.traits is None:
        raise ValueError("this baseline needs to know what the candidates are: give the ChoiceProblem its traits")
    return problem.traits


def _one_only(name: str, settings: SolverSettings) -> None:
    if settings.num_solutions != 1:
        raise ValueError(
            f"solver {name!r} gives one plan; for num_solutions: {settings.num_solutions} use the solver mip"
        )


def _allowed(problem: ChoiceProblem, label: Hashable) -> list[list[int]]:
    """Return the candidates of every layer that no limit of every plan forbids, of one label where there are labels."""
    labels = problem.labels or [[None] * len(row) for row in problem.quality_loss]
    forbidden = [
        [any(limit.coefficients[layer][i] == math.inf for limit in problem.limits) for i in range(len(row))]
        for layer, row in enumerate(problem.quality_loss)
    ]
    rows = [
        [i for i, other in enumerate(row) if (other == label or problem.labels is None) and not forbidden[layer][i]]
        for layer, row in enumerate(labels)
    ]
    if not all(rows):
        raise InfeasibleError("No plan: the limits forbid every candidate of a layer.")
    return rows


def _exceeded_most(problem: ChoiceProblem, chosen: Sequence[int]) -> Limit | None:
    """Return the limit with the largest relative excess, over each choice's best option; None when all hold."""
    groups = [min((_exceeded(option.limits, chosen) for option in options), key=_size) for options in problem.choices]
    worst = max([_exceeded(problem.limits, chosen), *groups], key=_size)
    return worst[1] if worst[0] > 0 else None


def _exceeded(limits: Sequence[Limit], chosen: Sequence[int]) -> tuple[float, Limit | None]:
    return max(((limit.excess(chosen), limit) for limit in limits), key=_size, default=(0.0, None))


def _size(item: tuple[float, Limit | None]) -> float:
    return item[0]


def _best(name: str, problem: ChoiceProblem, plans: Iterator[list[int]] | list[list[int]]) -> list[Solution]:
    found = []
    for plan in plans:
        options = problem.options_that_hold(plan)
        if options is not None:
            found.append(Solution(tuple(plan), problem.total_quality_loss(plan), options))
    if not found:
        raise InfeasibleError(
            f"The solver {name!r} found no plan within the limits, which does not mean that there is none: "
            "the solver mip decides that.",
            proven=False,
        )
    return [min(found, key=lambda solution: solution.quality_loss)]
