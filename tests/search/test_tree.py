"""tree.py: which bound is reported, and which candidates are left out."""

import math

import numpy as np
import pytest
from helpers.small_problems import SMALL, all_plans, feasible, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_puzzle.search.solver.tree import Tree


def test_a_bound_that_is_not_close_enough_is_reported():
    found = Tree(SMALL)
    found.best = (2.5 / found.scale, (0, 2), ())
    for below, proven in ((1e-10, True), (1e-8, False)):
        found.closed_bound = (2.5 - 2.5 * below) / found.scale
        solution = found._solution()
        assert solution is not None and solution.bound is not None
        assert solution.proven is proven and (solution.gap == 0) is proven
        assert solution.bound == pytest.approx(2.5 - (0 if proven else 2.5e-8), abs=1e-12)


@given(problems(), st.integers(0, 50))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_plan_up_to_the_ceiling_is_left_out(problem, which):
    plans = [plan for plan in all_plans(problem) if feasible(problem, plan)]
    if not plans:
        return
    ceiling = problem.total_quality_loss(plans[which % len(plans)])
    tree = Tree(problem, ceiling=ceiling)
    for plan in plans:
        if problem.total_quality_loss(plan) <= ceiling:
            assert all(tree.useful_C[begin + index] for begin, index in zip(tree.starts, plan))


def test_what_is_above_the_ceiling_does_not_set_the_scale():
    coarse, fine = Tree(SMALL), Tree(SMALL, ceiling=2.5)
    assert fine.useful_C.tolist() == [True, True, False, True, True, True]
    assert np.abs(coarse.cost_C).max() == np.abs(fine.cost_C).max() == 100.0
    assert fine.scale == pytest.approx(0.025) and coarse.scale == pytest.approx(0.03)
    assert Tree(SMALL, ceiling=math.inf).scale == coarse.scale
