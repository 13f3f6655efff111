"""baselines.py: on random and hand-made problems within the limits, never better than the exact search."""

from dataclasses import replace

import pytest
from helpers.small_problems import SMALL, all_plans, brute_force, feasible, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_puzzle.search.solver.baselines import greedy, max_parameters, random, uniform
from lit_puzzle.search.solver.choices import ChoiceProblem, InfeasibleError, Limit, Traits
from lit_puzzle.search.solver.settings import SolverSettings
from lit_puzzle.search.solver.solvers import solve


def with_traits(problem):
    """Made-up candidates: counts fall along a layer, every other candidate of even layers has a window."""
    shape = [len(row) for row in problem.quality_loss]
    counts = tuple(tuple(4 - index // 2 for index in range(width)) for width in shape)
    windows = tuple(
        tuple(16 if index % 2 and layer % 2 == 0 else None for index in range(width))
        for layer, width in enumerate(shape)
    )
    return replace(problem, traits=Traits(counts, windows, tuple(tuple(map(float, row)) for row in counts)))


def attempt(problem, name, seed):
    try:
        return solve(problem, SolverSettings(name=name, seed=seed)), None
    except InfeasibleError as error:
        return None, error


@given(problems(), st.sampled_from(["greedy", "uniform", "random", "max_parameters"]), st.integers(0, 3))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_within_the_limits_and_never_better_than_the_best(problem, name, seed):
    problem = with_traits(problem)
    best = brute_force(problem)
    found, error = attempt(problem, name, seed)
    if found is None:
        assert best is None or not error.proven
        return
    (solution,) = found
    assert feasible(problem, solution.chosen)
    assert solution.quality_loss == pytest.approx(problem.total_quality_loss(solution.chosen))
    assert best is not None and solution.quality_loss >= best - 1e-9
    assert solution.bound is None and not solution.proven
    for choice, index in enumerate(solution.options):
        assert all(limit.holds(solution.chosen) for limit in problem.choices[choice][index].limits)


def test_greedy_by_hand():
    # From (0, 0), 19 bytes of 12: savings per loss are 4 and 8/3 in layer 0, 3/2 and 7/2.5 in layer 1: (1, 0) first,
    # 15 bytes; then 4/2 in layer 0, 3/2 and 2.8 in layer 1: (1, 2), 8 bytes, loss 3.5. The optimum is 2.5.
    (solution,) = greedy(SMALL)
    assert solution.chosen == (1, 2) and solution.quality_loss == 3.5


def test_uniform_by_hand():
    layer = ((0.0, 1.0, 2.0, 3.0), (0.0, 1.0, 2.0, 3.0))
    # Layer 1 has the window 8 already and offers no other: it keeps it whatever the others do.
    traits = Traits(((8, 8, 4, 4), (8, 4, 2, 1)), ((None, 8, None, 8), (8, 8, 8, 8)), layer)
    cost = ((4.0, 2.0, 3.0, 1.0), (4.0, 2.0, 1.0, 1.0))
    problem = ChoiceProblem(layer, (Limit("cost", cost, 0.0, 5.0),), traits=traits)
    # 8 experts: (0, 0) costs 8, with window (1, 0) 6; 4 experts: (2, 1) costs 5 with loss 3, (3, 1) 3 with loss 4.
    assert uniform(problem)[0].chosen == (2, 1)
    with pytest.raises(InfeasibleError, match="does not mean that there is none"):
        uniform(replace(problem, limits=(Limit("cost", cost, 0.0, 2.0),)))


@given(problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_max_parameters_keeps_the_most(problem):
    problem = with_traits(problem)
    plans = [plan for plan in all_plans(problem) if feasible(problem, plan)]
    if plans:
        kept = problem.traits.parameters
        most = max(sum(row[i] for row, i in zip(kept, plan)) for plan in plans)
        (solution,) = max_parameters(problem)
        assert sum(row[i] for row, i in zip(kept, solution.chosen)) == most


def test_random_is_seeded_and_varies():
    problem = ChoiceProblem(((0.0, 1.0, 2.0, 3.0),) * 6, (Limit("cost", ((4.0, 3.0, 2.0, 1.0),) * 6, 0.0, 14.0),))
    plans = [random(problem, SolverSettings(seed=seed))[0].chosen for seed in range(8)]
    assert plans == [random(problem, SolverSettings(seed=seed))[0].chosen for seed in range(8)]
    assert len(set(plans)) > 4


@pytest.mark.parametrize("name", ["greedy", "uniform", "random"])
def test_more_than_one_plan_is_refused(name):
    with pytest.raises(ValueError, match="use the solver mip"):
        solve(with_traits(SMALL), SolverSettings(name=name, num_solutions=2))


@pytest.mark.parametrize("solver", [uniform, max_parameters])
def test_missing_traits_are_refused(solver):
    with pytest.raises(ValueError, match="traits"):
        solver(SMALL)
