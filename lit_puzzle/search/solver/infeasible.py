"""The error message when there is no plan: a budget that no plan meets, or budgets that no plan meets together.

First every budget alone: its cheapest plan takes the cheapest candidate of every layer, over all options with that
budget. If each can be met alone, the plan with the smallest relaxation is found (minimize t, where every limit may
exceed its bound by the fraction t), and two budgets that exclude each other are searched pair by pair. Totals are given
in the user's unit. Where a throughput is missed, the message also gives the best one that can be reached within the
memory of its deployments and the limits of every plan; the other scenarios are ignored for that.

Reads and writes nothing.

Source: elastic programs (Chinneck, "Feasibility and Infeasibility in Optimization", 2008) for the smallest relaxation.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace

from lit_puzzle.search.solver.choices import ChoiceProblem, InfeasibleError, Limit, Option
from lit_puzzle.search.solver.counts import cheapest
from lit_puzzle.search.solver.extended import extended, restored
from lit_puzzle.search.solver.tree import Tree

TIME_LIMIT_SECONDS = 20.0  # for the smallest relaxation and the pair; after that the message has less detail


@dataclass(frozen=True)
class Cheapest:
    """The cheapest plan for one limit, all others ignored.

    Attributes:
        limit: the limit.
        chosen: the plan.
        needed: its total.
        excess: how far that exceeds the bound, relative to it.
    """

    limit: Limit
    chosen: tuple[int, ...]
    needed: float
    excess: float


def explain(problem: ChoiceProblem) -> InfeasibleError:
    """Return the error for a problem without a plan."""
    if problem.labels is not None and not problem.common_labels():
        return InfeasibleError("No plan: uniform_experts is set, and the layers have no expert count in common.")
    alone = sorted((_cheapest_of(problem, name) for name in _names(problem)), key=lambda c: -c.excess)
    failing = [cheapest for cheapest in alone if cheapest.excess > 0]
    return _one_fails(problem, failing) if failing else _none_fails_alone(problem)


def _names(problem: ChoiceProblem) -> list[str]:
    return list(dict.fromkeys(limit.name for limit in problem.every_limit()))


def _cheapest_of(problem: ChoiceProblem, name: str) -> Cheapest:
    """Return the cheapest plan with the smallest excess over all limits of this name (one per option)."""
    limits = [limit for limit in problem.every_limit() if limit.name == name]
    return min((_cheapest(problem, limit) for limit in limits), key=lambda cheapest: cheapest.excess)


def _cheapest(problem: ChoiceProblem, limit: Limit) -> Cheapest:
    plans = []
    for label in problem.common_labels() or [None]:
        chosen, priced = [], []
        for layer, row in enumerate(limit.coefficients):
            labels = None if problem.labels is None else problem.labels[layer]
            allowed = [i for i in range(len(row)) if labels is None or labels[i] == label]
            chosen.append(min(allowed, key=lambda i: (row[i], problem.quality_loss[layer][i])))
            priced.append([value if i in allowed else math.inf for i, value in enumerate(row)])
        plans.append(tuple(chosen) if limit.table is None else cheapest(priced, limit.table))
    best = min(plans, key=limit.total)
    return Cheapest(limit, best, limit.total(best), limit.excess(best))


def _one_fails(problem: ChoiceProblem, failing: list[Cheapest]) -> InfeasibleError:
    tightest = failing[0]
    needs = {cheapest.limit.name: _needed_and_allowed(cheapest.limit, cheapest.needed) for cheapest in failing}
    if tightest.needed == math.inf:
        taken = zip(tightest.limit.coefficients, tightest.chosen)
        layer = next(layer for layer, (row, index) in enumerate(taken) if row[index] == math.inf)
        message = f"No plan: {tightest.limit.name!r} forbids every candidate of layer {layer}."
    else:
        message = (
            f"No plan: the tightest budget is {tightest.limit.name!r}. Its cheapest plan "
            f"{_compared(tightest.limit, tightest.needed)}."
        )
        message += _reachable(problem, tightest.limit, time.monotonic() + TIME_LIMIT_SECONDS)
    others = ", ".join(repr(cheapest.limit.name) for cheapest in failing[1:])
    more = f" These cannot be met alone either: {others}." if others else ""
    return InfeasibleError(message + more, tightest.chosen, needs=needs)


def _needed_and_allowed(limit: Limit, total: float) -> tuple[float, float]:
    return limit.in_user_unit(total), limit.in_user_unit(limit.bound)


def _compared(limit: Limit, total: float) -> str:
    """Return a total and its bound in words, in the user's unit."""
    needed, bound = _needed_and_allowed(limit, total)
    if limit.numerator is not None:
        return f"reaches {_number(needed)}, required is {_number(bound)} ({1 - needed / bound:.1%} too little)"
    over = (total - limit.bound) / (abs(limit.bound) or 1.0)
    return f"needs {_number(needed)}, allowed is {_number(bound)} ({over:.1%} too much)"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.6g}"


def _reachable(problem: ChoiceProblem, limit: Limit, deadline: float) -> str:
    """Return the best rate that plans can reach in words, over all limits of this name; empty when it is no rate."""
    if limit.numerator is None:
        return ""
    rates = []
    for option in itertools.chain(*problem.choices):
        for own in option.limits:
            if own.name == limit.name and own.numerator is not None:
                seconds = _smallest_total(problem, option, own, deadline)
                rates += [] if seconds is None else [(own.in_user_unit(seconds), option.name)]
    if time.monotonic() > deadline or not rates:
        return ""
    rate, where = max(rates)
    return f" Within the other limits of its deployments at most {_number(rate)} can be reached there ({where})."


def _smallest_total(problem: ChoiceProblem, option: Option, limit: Limit, deadline: float) -> float | None:
    """Return the smallest total of a limit over the plans within all other limits of its option and of every plan."""
    large = max(value for row in limit.coefficients for value in row if value < math.inf)
    forbidden = tuple(tuple(value if value == math.inf else 0.0 for value in row) for row in limit.coefficients)
    others = tuple(other for other in option.limits if other is not limit)
    alone = replace(
        problem,
        quality_loss=tuple(tuple(min(value, large) for value in row) for row in limit.coefficients),
        limits=(*problem.limits, *others, Limit("can be served", forbidden, 0.0, 0.0)),
        choices=(),
    )
    found = Tree(extended(alone), relative_gap=1e-3, deadline=deadline).run()
    return None if found is None else limit.total(restored(alone, found).chosen)


def _none_fails_alone(problem: ChoiceProblem) -> InfeasibleError:
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    nearest = Tree(extended(problem), relative_gap=1e-3, deadline=deadline, elastic=True).run()
    if nearest is None:
        return InfeasibleError("No plan: every budget can be met alone, but not all together.")
    nearest = restored(problem, nearest)
    options = [problem.choices[choice][index] for choice, index in enumerate(nearest.options)]
    limits = [*problem.limits, *itertools.chain(*(option.limits for option in options))]
    over = sorted((limit for limit in limits if limit.excess(nearest.chosen)), key=lambda o: -o.excess(nearest.chosen))
    needs = {limit.name: _needed_and_allowed(limit, limit.total(nearest.chosen)) for limit in over}
    pair = _excluding_pair(problem, [limit.name for limit in over], deadline)
    who = f"{pair[0]!r} and {pair[1]!r} exclude each other" if pair else "not all of them can be met together"
    totals = "; ".join(f"{limit.name!r} {_compared(limit, limit.total(nearest.chosen))}" for limit in over)
    rate = next((limit for limit in over if limit.numerator is not None), None)
    reach = "" if rate is None else _reachable(problem, rate, deadline)
    worst = max((limit.excess(nearest.chosen) for limit in over), default=0.0)
    where = f" ({', '.join(option.name for option in options)})" if options else ""
    return InfeasibleError(
        f"No plan: every budget can be met alone, but {who}. With the smallest relaxation, {worst:.1%} of each bound, "
        f"there is a plan{where}: {totals}.{reach}",
        nearest.chosen,
        nearest.options,
        needs,
    )


def _excluding_pair(problem: ChoiceProblem, first: list[str], deadline: float) -> tuple[str, str] | None:
    """Return two limits that no plan meets together, or None; pairs with those of `first` are tried first."""
    names = [*first, *(name for name in _names(problem) if name not in first)]
    for left, right in itertools.combinations(names, 2):
        tree = Tree(extended(_only(problem, (left, right))), deadline=deadline)
        if tree.run() is None and not tree.timed_out:
            return left, right
    return None


def _only(problem: ChoiceProblem, names: tuple[str, ...]) -> ChoiceProblem:
    """Return the problem with the limits of these names only and without quality losses: is there any plan?"""

    def kept(limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        return tuple(limit for limit in limits if limit.name in names)

    choices = tuple(tuple(Option(o.name, kept(o.limits)) for o in options) for options in problem.choices)
    zeros = tuple((0.0,) * len(row) for row in problem.quality_loss)
    return replace(problem, quality_loss=zeros, limits=kept(problem.limits), choices=choices)
