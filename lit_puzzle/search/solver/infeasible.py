"""Why there is no plan: which budget no plan meets, or which budgets no plan meets together.

First every budget alone: its cheapest plan is the cheapest candidate of every layer, over all options that carry it.
If each can be met alone, the plan with the smallest relaxation is found (minimize t, where every limit may exceed its
bound by the fraction t), and two budgets that exclude each other are looked for pair by pair.
Totals are told in the unit that the user asked in; where a rate is missed, also the best that can be reached within the
memory of its deployments and the limits that always hold, with the other choices left aside.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace

from lit_puzzle.search.solver.choices import ChoiceProblem, Infeasible, Limit, Option
from lit_puzzle.search.solver.tree import Tree

SECONDS = 20.0  # for finding the smallest relaxation and the pair; after that the message says less


@dataclass(frozen=True)
class Cheapest:
    """The cheapest plan for one limit, whatever the others say."""

    limit: Limit
    chosen: tuple[int, ...]
    needed: float
    excess: float


def explain(problem: ChoiceProblem) -> Infeasible:
    """The error for a problem without a plan."""
    if problem.same is not None and not problem.labels():
        return Infeasible("No label is offered by every layer: the layers have no expert count in common.")
    alone = sorted((_cheapest_of(problem, name) for name in _names(problem)), key=lambda c: -c.excess)
    failing = [cheapest for cheapest in alone if cheapest.excess > 0]
    return _one_fails(problem, failing) if failing else _none_fails_alone(problem)


def _names(problem: ChoiceProblem) -> list[str]:
    return list(dict.fromkeys(limit.name for limit in problem.every_limit()))


def _cheapest_of(problem: ChoiceProblem, name: str) -> Cheapest:
    """The least excess over all limits of this name (one per option)."""
    limits = [limit for limit in problem.every_limit() if limit.name == name]
    return min((_cheapest(problem, limit) for limit in limits), key=lambda cheapest: cheapest.excess)


def _cheapest(problem: ChoiceProblem, limit: Limit) -> Cheapest:
    plans = []
    for label in problem.labels() or [None]:
        chosen = []
        for layer, row in enumerate(limit.coefficients):
            labels = None if problem.same is None else problem.same[layer]
            allowed = [i for i in range(len(row)) if labels is None or labels[i] == label]
            chosen.append(min(allowed, key=lambda i: (row[i], problem.quality_loss[layer][i])))
        plans.append(tuple(chosen))
    best = min(plans, key=limit.total)
    return Cheapest(limit, best, limit.total(best), limit.excess(best))


def _one_fails(problem: ChoiceProblem, failing: list[Cheapest]) -> Infeasible:
    tightest = failing[0]
    needs = {cheapest.limit.name: _told(cheapest.limit, cheapest.needed) for cheapest in failing}
    if tightest.needed == math.inf:
        taken = zip(tightest.limit.coefficients, tightest.chosen)
        layer = next(layer for layer, (row, index) in enumerate(taken) if row[index] == math.inf)
        message = f"No plan: {tightest.limit.name!r} forbids every candidate of layer {layer}."
    else:
        message = (
            f"No plan: the tightest budget is {tightest.limit.name!r}. Its cheapest plan "
            f"{_compared(tightest.limit, tightest.needed)}."
        )
        message += _reachable(problem, tightest.limit, time.monotonic() + SECONDS)
    others = ", ".join(repr(cheapest.limit.name) for cheapest in failing[1:])
    more = f" By themselves these cannot be met either: {others}." if others else ""
    return Infeasible(message + more, tightest.chosen, needs=needs)


def _told(limit: Limit, total: float) -> tuple[float, float]:
    return limit.told(total), limit.told(limit.bound)


def _compared(limit: Limit, total: float) -> str:
    """What a total comes to against what was asked for, in the user's unit."""
    needed, bound = _told(limit, total)
    if limit.numerator is not None:
        return f"reaches {_number(needed)}, asked for is {_number(bound)} ({1 - needed / bound:.1%} too little)"
    over = (total - limit.bound) / (abs(limit.bound) or 1.0)
    return f"needs {_number(needed)}, allowed is {_number(bound)} ({over:.1%} too much)"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.6g}"


def _reachable(problem: ChoiceProblem, limit: Limit, deadline: float) -> str:
    """The best rate that plans can reach, when the limit is one; the first of equal names stands for them all."""
    if limit.numerator is None:
        return ""
    rates = []
    for option in itertools.chain(*problem.choices):
        for own in option.limits:
            if own.name == limit.name and own.numerator is not None:
                seconds = _least(problem, option, own, deadline)
                rates += [] if seconds is None else [(own.told(seconds), option.name)]
    if time.monotonic() > deadline or not rates:
        return ""
    rate, where = max(rates)
    return f" With the other limits of its deployments kept, at most {_number(rate)} can be reached there ({where})."


def _least(problem: ChoiceProblem, option: Option, limit: Limit, deadline: float) -> float | None:
    """The smallest total of a limit among plans within all others of its option and those that always hold."""
    large = max(value for row in limit.coefficients for value in row if value < math.inf)
    forbidden = tuple(tuple(value if value == math.inf else 0.0 for value in row) for row in limit.coefficients)
    others = tuple(other for other in option.limits if other is not limit)
    alone = replace(
        problem,
        quality_loss=tuple(tuple(min(value, large) for value in row) for row in limit.coefficients),
        limits=(*problem.limits, *others, Limit("can be served", forbidden, 0.0, 0.0)),
        choices=(),
    )
    found = Tree(alone, relative_gap=1e-3, deadline=deadline).run()
    return None if found is None else limit.total(found.chosen)


def _none_fails_alone(problem: ChoiceProblem) -> Infeasible:
    deadline = time.monotonic() + SECONDS
    nearest = Tree(problem, relative_gap=1e-3, deadline=deadline, elastic=True).run()
    if nearest is None:
        return Infeasible("No plan: every budget can be met alone, but not all together.")
    options = [problem.choices[choice][index] for choice, index in enumerate(nearest.options)]
    limits = [*problem.limits, *itertools.chain(*(option.limits for option in options))]
    over = sorted((limit for limit in limits if limit.excess(nearest.chosen)), key=lambda o: -o.excess(nearest.chosen))
    needs = {limit.name: _told(limit, limit.total(nearest.chosen)) for limit in over}
    pair = _excluding_pair(problem, [limit.name for limit in over], deadline)
    who = f"{pair[0]!r} and {pair[1]!r} exclude each other" if pair else "not all of them can be met together"
    wants = "; ".join(f"{limit.name!r} {_compared(limit, limit.total(nearest.chosen))}" for limit in over)
    rate = next((limit for limit in over if limit.numerator is not None), None)
    reach = "" if rate is None else _reachable(problem, rate, deadline)
    worst = max((limit.excess(nearest.chosen) for limit in over), default=0.0)
    where = f" ({', '.join(option.name for option in options)})" if options else ""
    return Infeasible(
        f"No plan: every budget can be met alone, but {who}. With the smallest relaxation, {worst:.1%} on each, "
        f"there is a plan{where}: {wants}.{reach}",
        nearest.chosen,
        nearest.options,
        needs,
    )


def _excluding_pair(problem: ChoiceProblem, first: list[str], deadline: float) -> tuple[str, str] | None:
    """Two limits that no plan meets together; pairs with those of `first` are tried first."""
    names = [*first, *(name for name in _names(problem) if name not in first)]
    for left, right in itertools.combinations(names, 2):
        tree = Tree(_only(problem, (left, right)), deadline=deadline)
        if tree.run() is None and not tree.timed_out:
            return left, right
    return None


def _only(problem: ChoiceProblem, names: tuple[str, ...]) -> ChoiceProblem:
    """The problem with the limits of these names only and without damages: is there any plan?"""

    def kept(limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        return tuple(limit for limit in limits if limit.name in names)

    choices = tuple(tuple(Option(o.name, kept(o.limits)) for o in options) for options in problem.choices)
    nothing = tuple((0.0,) * len(row) for row in problem.quality_loss)
    return replace(problem, quality_loss=nothing, limits=kept(problem.limits), choices=choices)
