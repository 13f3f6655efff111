"""Why there is no plan: which budget no plan meets, or which budgets no plan meets together.

First every budget alone: its cheapest plan is the cheapest candidate of every layer, over all options that carry it.
If each can be met alone, the plan with the smallest relaxation is found (minimise t, where every limit may exceed its
bound by the fraction t), and two budgets that exclude each other are looked for pair by pair.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace

from lit_puzzle.search.mip import Tree
from lit_puzzle.search.solver.choices import Infeasible, Limit, Option, Problem

SECONDS = 20.0  # for finding the smallest relaxation and the pair; after that the message says less


@dataclass(frozen=True)
class Cheapest:
    """The cheapest plan for one limit, whatever the others say."""

    limit: Limit
    chosen: tuple[int, ...]
    needed: float
    excess: float


def explain(problem: Problem) -> Infeasible:
    """The error for a problem without a plan."""
    if problem.same is not None and not problem.labels():
        return Infeasible("No label is offered by every layer: the layers have no expert count in common.")
    alone = sorted((_cheapest_of(problem, name) for name in _names(problem)), key=lambda c: -c.excess)
    failing = [cheapest for cheapest in alone if cheapest.excess > 0]
    return _one_fails(failing) if failing else _none_fails_alone(problem)


def _names(problem: Problem) -> list[str]:
    return list(dict.fromkeys(limit.name for limit in problem.every_limit()))


def _cheapest_of(problem: Problem, name: str) -> Cheapest:
    """The least excess over all limits of this name (one per option)."""
    limits = [limit for limit in problem.every_limit() if limit.name == name]
    return min((_cheapest(problem, limit) for limit in limits), key=lambda cheapest: cheapest.excess)


def _cheapest(problem: Problem, limit: Limit) -> Cheapest:
    plans = []
    for label in problem.labels() or [None]:
        chosen = []
        for layer, row in enumerate(limit.coefficients):
            labels = None if problem.same is None else problem.same[layer]
            allowed = [i for i in range(len(row)) if labels is None or labels[i] == label]
            chosen.append(min(allowed, key=lambda i: (row[i], problem.damage[layer][i])))
        plans.append(tuple(chosen))
    best = min(plans, key=limit.total)
    return Cheapest(limit, best, limit.total(best), limit.excess(best))


def _one_fails(failing: list[Cheapest]) -> Infeasible:
    tightest = failing[0]
    needs = {cheapest.limit.name: (cheapest.needed, cheapest.limit.bound) for cheapest in failing}
    if tightest.needed == math.inf:
        taken = zip(tightest.limit.coefficients, tightest.chosen)
        layer = next(layer for layer, (row, index) in enumerate(taken) if row[index] == math.inf)
        message = f"No plan: {tightest.limit.name!r} forbids every candidate of layer {layer}."
    else:
        message = (
            f"No plan: the tightest budget is {tightest.limit.name!r}. Its cheapest plan needs {tightest.needed:.6g}, "
            f"allowed is {tightest.limit.bound:.6g} ({tightest.excess:.1%} too much)."
        )
    others = ", ".join(repr(cheapest.limit.name) for cheapest in failing[1:])
    more = f" By themselves these cannot be met either: {others}." if others else ""
    return Infeasible(message + more, tightest.chosen, needs=needs)


def _none_fails_alone(problem: Problem) -> Infeasible:
    deadline = time.monotonic() + SECONDS
    nearest = Tree(problem, relative_gap=1e-3, deadline=deadline, elastic=True).run()
    if nearest is None:
        return Infeasible("No plan: every budget can be met alone, but not all together.")
    options = [problem.choices[choice][index] for choice, index in enumerate(nearest.options)]
    limits = [*problem.limits, *itertools.chain(*(option.limits for option in options))]
    over = sorted((limit for limit in limits if limit.excess(nearest.chosen)), key=lambda o: -o.excess(nearest.chosen))
    needs = {limit.name: (limit.total(nearest.chosen), limit.bound) for limit in over}
    pair = _excluding_pair(problem, [limit.name for limit in over], deadline)
    who = f"{pair[0]!r} and {pair[1]!r} exclude each other" if pair else "not all of them can be met together"
    wants = "; ".join(f"{name!r} needs {need:.6g}, allowed is {bound:.6g}" for name, (need, bound) in needs.items())
    worst = max((limit.excess(nearest.chosen) for limit in over), default=0.0)
    where = f" ({', '.join(option.name for option in options)})" if options else ""
    return Infeasible(
        f"No plan: every budget can be met alone, but {who}. With the smallest relaxation, {worst:.1%} on each, "
        f"there is a plan{where}: {wants}.",
        nearest.chosen,
        nearest.options,
        needs,
    )


def _excluding_pair(problem: Problem, first: list[str], deadline: float) -> tuple[str, str] | None:
    """Two limits that no plan meets together; pairs with those of `first` are tried first."""
    names = [*first, *(name for name in _names(problem) if name not in first)]
    for left, right in itertools.combinations(names, 2):
        tree = Tree(_only(problem, (left, right)), deadline=deadline)
        if tree.run() is None and not tree.timed_out:
            return left, right
    return None


def _only(problem: Problem, names: tuple[str, ...]) -> Problem:
    """The problem with the limits of these names only and without damages: is there any plan?"""

    def kept(limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        return tuple(limit for limit in limits if limit.name in names)

    choices = tuple(tuple(Option(o.name, kept(o.limits)) for o in options) for options in problem.choices)
    nothing = tuple((0.0,) * len(row) for row in problem.damage)
    return replace(problem, damage=nothing, limits=kept(problem.limits), choices=choices)
