"""highs.py: bounds and solutions of single programs against enumeration."""

import math

import numpy as np
import pytest
from helpers.small_problems import SMALL, all_plans, brute_force, feasible, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_puzzle.search.solver import highs
from lit_puzzle.search.solver.choices import ChoiceProblem, Limit
from lit_puzzle.search.solver.highs import LinearProgram, Row
from lit_puzzle.search.solver.tree import Tree


def without_choices(problem):
    return ChoiceProblem(problem.quality_loss, problem.limits)


@given(problems(), st.lists(st.floats(0, 3), min_size=2, max_size=2))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_bounds_are_valid_for_any_duals(problem, duals):
    problem = without_choices(problem)
    tree, best = Tree(problem), brute_force(without_choices(problem))
    program = tree.program(())
    relaxation = highs.relax(program)
    if best is None:
        return
    assert relaxation is not None
    arbitrary = highs._lagrangian(program, np.array(duals[: len(problem.limits)]))
    for bound in (relaxation, arbitrary):
        assert bound.bound * tree.scale <= best + 1e-9
        for plan in all_plans(problem):  # a plan with this candidate costs at least bound + extra
            if feasible(problem, plan):
                columns = [begin + index for begin, index in zip(tree.starts, plan)]
                worst = max(bound.extra_C[column] for column in columns)
                assert (bound.bound + worst) * tree.scale <= problem.total_quality_loss(plan) + 1e-8


@given(problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_an_elastic_program_gives_the_smallest_largest_excess(problem):
    problem = without_choices(problem)
    if any(math.inf in row for limit in problem.limits for row in limit.coefficients) or not problem.limits:
        return
    program = Tree(problem, elastic=True).program(())
    outcome = highs.solve(program, math.inf, 0.0, 10.0)
    smallest = min(max(limit.excess(plan) for limit in problem.limits) for plan in all_plans(problem))
    assert outcome.objective == pytest.approx(smallest, abs=1e-7)
    relaxation = highs.relax(program)
    assert relaxation is not None and relaxation.bound <= smallest + 1e-9


def test_a_row_by_hand():
    row = Row.of(SMALL.limits[0], elastic=False)  # room 11; the cheapest others take 2 and 1
    assert row.allowed_C.all() and row.room == 1.0
    assert row.values_C == pytest.approx(np.array([9, 5, 1, 9, 6, 2]) / 11)
    tight = Row.of(Limit("x", SMALL.limits[0].coefficients, 1.0, 8.0), elastic=False)  # 7 for the layers
    assert tight.allowed_C.tolist() == [False, True, True, False, True, True]


def test_a_layer_without_candidates_has_no_plan():
    program = LinearProgram((0, 1, 2), np.zeros(2), np.zeros((0, 2)), np.zeros(0), np.array([True, False]))
    assert highs.relax(program) is None
    assert highs.solve(program, math.inf, 0.0, 1.0).chosen is None
