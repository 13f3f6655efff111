"""infeasible.py: messages of a search without a plan: which budget, by how much, and which plan comes nearest."""

import math
from dataclasses import replace

import pytest
from helpers.small_problems import SMALL, all_plans, brute_force, problems, within
from hypothesis import given, settings

from lit_puzzle.search.solver import mip
from lit_puzzle.search.solver.choices import ChoiceProblem, InfeasibleError, Limit, Option
from lit_puzzle.search.solver.infeasible import explain


def test_one_budget_that_no_plan_meets_is_named_with_its_cheapest_plan():
    problem = replace(SMALL, limits=(*SMALL.limits, Limit("seconds", ((3.0, 2.0, 2.0), (5.0, 4.0, 1.0)), 0.0, 2.0)))
    with pytest.raises(InfeasibleError, match=r"'seconds'.*needs 3, allowed is 2 \(50.0% too much\)") as caught:
        mip.solve(problem)
    assert caught.value.chosen == (1, 2) and caught.value.needs == {"seconds": (3.0, 2.0)}


def test_two_budgets_that_exclude_each_other_are_named():
    here, there = ((1.0, 4.0),), ((4.0, 1.0),)
    problem = ChoiceProblem(
        ((0.0, 1.0),) * 2, (Limit("a", here * 2, 0, 4), Limit("b", there * 2, 0, 4), Limit("c", here * 2, 0, 9))
    )
    with pytest.raises(
        InfeasibleError, match=r"'a' and 'b' exclude each other.*smallest relaxation, 25.0% of each bound"
    ) as caught:
        mip.solve(problem)
    assert caught.value.chosen is not None and sum(caught.value.chosen) == 1
    assert set(caught.value.needs) == {"a", "b"}


def test_a_forbidden_layer_is_named():
    limit = Limit("divisible by 8", ((0.0, math.inf), (math.inf, math.inf)), 0.0, 0.0)
    with pytest.raises(InfeasibleError, match="'divisible by 8' forbids every candidate of layer 1"):
        mip.solve(ChoiceProblem(((0.0, 1.0),) * 2, (limit,)))


def test_limits_of_one_option_are_combined():
    """Seconds need the big batch, memory the small one: each alone is possible, both are not."""
    options = tuple(
        Option(
            f"batch {batch}",
            (Limit("memory", ((batch, batch / 2),), 0, 1.5), Limit("seconds", ((3 / batch,) * 2,), 0, 0.9)),
        )
        for batch in (1.0, 4.0)
    )
    with pytest.raises(
        InfeasibleError, match=r"'memory' and 'seconds' exclude each other.*33.3% of each bound.*batch 4"
    ) as caught:
        mip.solve(ChoiceProblem(((0.0, 1.0),), (), (options,)))
    assert caught.value.chosen == (1,) and caught.value.options == (1,)
    assert caught.value.needs == {"memory": (2.0, 1.5)}


def test_labels_in_common():
    with pytest.raises(InfeasibleError, match="no expert count in common"):
        mip.solve(ChoiceProblem(((0.0,), (0.0,)), labels=((1,), (2,))))


@given(problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_named_is_true(problem):
    """Of a single budget: no plan meets it. The plan shown needs what the message says."""
    if brute_force(problem) is not None:
        return
    error = explain(problem)
    assert error.proven
    if "the tightest budget is" in str(error):
        named = [limit for limit in problem.every_limit() if limit.name in error.needs]
        plans = [p for p in all_plans(problem) if problem.has_one_label(p)]
        assert named and not any(within(limit, plan) for limit in named for plan in plans)
    if "exclude each other" in str(error):
        left, right = str(error).split("but '")[1].split("' exclude")[0].split("' and '")
        keep = {left, right}

        def only(limits):
            return tuple(limit for limit in limits if limit.name in keep)

        choices = tuple(tuple(Option(o.name, only(o.limits)) for o in options) for options in problem.choices)
        assert brute_force(replace(problem, limits=only(problem.limits), choices=choices)) is None
    for name, (needed, _) in list(error.needs.items())[:1]:
        totals = [limit.total(error.chosen) for limit in problem.every_limit() if limit.name == name]
        assert any(needed == pytest.approx(total) for total in totals)
