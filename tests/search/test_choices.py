"""choices.py: sums, tolerances and labels of choice problems, and what is refused."""

import math
from dataclasses import replace

import pytest
from helpers.small_problems import SMALL, all_plans, feasible, problems
from hypothesis import given, settings

from lit_puzzle.search.solver.choices import ChoiceProblem, Limit


@given(problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_options_that_hold_are_those_of_feasible_plans(problem):
    for plan in list(all_plans(problem))[:50]:
        assert (problem.options_that_hold(plan) is not None) == feasible(problem, plan)


def test_sums_and_tolerance_by_hand():
    limit = Limit("x", ((0.1, 1.0), (0.2, math.inf)), 0.0, 0.3)
    assert limit.holds((0, 0))  # 0.1 + 0.2 > 0.3 in floating point
    assert not limit.holds((1, 0)) and limit.excess((1, 0)) == pytest.approx(3.0)
    assert limit.total((0, 1)) == math.inf and not limit.holds((0, 1))
    assert not Limit("y", ((1.0 + 1e-8,),), 0.0, 1.0).holds((0,))
    assert Limit("zero", ((0.0, 1.0),), 0.0, 0.0).holds((0,)) and not Limit("z", ((0.0, 1.0),), 0.0, 0.0).holds((1,))


def test_labels_are_those_of_every_layer():
    problem = ChoiceProblem(((0.0, 0.0), (0.0, 0.0)), labels=((8, 16), (16, 4)))
    assert problem.common_labels() == [16]
    assert problem.has_one_label((1, 0)) and not problem.has_one_label((0, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quality_loss": ((0.0, math.nan), (0.0, 1.0))}, "finite number"),
        ({"quality_loss": ((), (0.0,))}, "at least one candidate"),
        ({"limits": (Limit("x", ((1.0,), (1.0,)), 0, 1),)}, "one coefficient for every candidate"),
        ({"limits": (Limit("x", ((-math.inf, 1.0, 1.0),) * 2, 0, 1),)}, "must be finite"),
        ({"choices": ((),)}, "no option"),
        ({"labels": ((1,), (1, 2))}, "one label"),
    ],
)
def test_a_bad_problem_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
