"""mip.py: the exact solver against enumeration of every plan, on small random problems and on hand-made ones."""

import itertools
import math
import random
from dataclasses import replace
from unittest import mock

import pytest
from helpers.small_problems import SMALL, brute_force, feasible, problems, within
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_puzzle.search.solver import highs, mip, tree
from lit_puzzle.search.solver.choices import ChoiceProblem, DisagreementError, InfeasibleError, Limit, Option
from lit_puzzle.search.solver.settings import EarlierPlans, SolverSettings

FEW = settings(max_examples=120, deadline=None, derandomize=True)


@given(problems(), st.sampled_from([1, 1, 3]))
@FEW
def test_equals_brute_force(problem, first_columns):
    # With 1 the first programs lack candidates that the best plan may need.
    with mock.patch.object(tree, "FIRST_COLUMNS", first_columns):
        check_against_brute_force(problem)


def check_against_brute_force(problem):
    best = brute_force(problem)
    if best is None:
        with pytest.raises(InfeasibleError) as caught:
            mip.solve(problem)
        assert caught.value.proven and "No " in str(caught.value)
        return
    (solution,) = mip.solve(problem)
    assert solution.quality_loss == pytest.approx(best, abs=1e-9)
    assert feasible(problem, solution.chosen)
    assert solution.proven and solution.gap == 0 and solution.bound == pytest.approx(best, abs=1e-9)
    for options, index in zip(problem.choices, solution.options, strict=True):
        assert all(within(limit, solution.chosen) for limit in options[index].limits)


@given(problems(), st.sampled_from([0.3, 0.5, 0.7, 0.8]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_alternatives_differ_and_are_the_best_of_those_that_differ(problem, alpha):
    if brute_force(problem) is None:
        return
    found = mip.solve(problem, SolverSettings(num_solutions=4, alpha=alpha))
    for position, solution in enumerate(found):
        earlier = [other.chosen for other in found[:position]]
        assert solution.quality_loss == pytest.approx(brute_force(problem, earlier, alpha), abs=1e-9)
        for other in earlier:
            assert sum(a == b for a, b in zip(solution.chosen, other)) <= alpha * problem.num_layers + 1e-9
    if len(found) < 4:
        assert brute_force(problem, [solution.chosen for solution in found], alpha) is None


@given(problems(), st.sampled_from([0.05, 0.3]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_gap_is_kept_and_its_bound_is_valid(problem, gap):
    best = brute_force(problem)
    if best is None:
        return
    (solution,) = mip.solve(problem, SolverSettings(relative_gap=gap))
    assert solution.bound is not None and solution.bound <= best + 1e-9
    assert solution.quality_loss - best <= gap * abs(solution.quality_loss) + 1e-9
    assert solution.proven


def test_by_hand():
    # 11 bytes are left for the layers: (1, 1) has 11 and loss 3, (0, 2) has 11 and loss 2.5, (2, 0) has 10 and loss 3.
    (solution,) = mip.solve(SMALL)
    assert solution.chosen == (0, 2) and solution.quality_loss == 2.5


def test_a_corrupted_outcome_is_caught(monkeypatch):
    honest = highs.solve

    def corrupted(*arguments):
        outcome = honest(*arguments)
        assert outcome.chosen is not None
        return replace(outcome, chosen=tuple(2 - index for index in outcome.chosen))

    monkeypatch.setattr(highs, "solve", corrupted)
    with pytest.raises(DisagreementError, match="adds up to"):
        mip.solve(SMALL)


def test_plans_over_a_bound_are_cut_off_and_solved_again(monkeypatch):
    honest, calls = highs.solve, []

    def lenient(program, *arguments):
        calls.append(program)
        loose = replace(program, room_R=program.room_R + (0.4 if len(calls) == 1 else 0.0))
        return honest(loose, *arguments)

    monkeypatch.setattr(highs, "solve", lenient)
    (solution,) = mip.solve(SMALL)  # the first outcome, (0, 1) with 16 bytes, exceeds the limit
    assert solution.chosen == (0, 2) and len(calls) == 2
    monkeypatch.setattr(
        highs, "solve", lambda program, *rest: honest(replace(program, room_R=program.room_R + 9), *rest)
    )
    with pytest.raises(DisagreementError, match="exceed the limits"):
        mip.solve(SMALL)


def test_a_time_limit_gives_a_valid_bound(monkeypatch):
    hard = knapsack(layers=20, candidates=8)
    (exact,) = mip.solve(hard)
    moment = itertools.count()
    opened = tree.Tree._open

    def slow(search, node):
        if search.best is not None and next(moment) >= 0:
            search.deadline = -math.inf
        opened(search, node)

    monkeypatch.setattr(tree.Tree, "_open", slow)
    (stopped,) = mip.solve(hard)
    assert stopped.bound is not None
    assert stopped.bound <= exact.quality_loss + 1e-9 <= stopped.quality_loss + 2e-9
    assert stopped.proven == (stopped.gap == 0)


def test_no_time_at_all_is_no_proof_of_infeasibility():
    with pytest.raises(ValueError, match="No plan was found in 1e-09 seconds") as caught:
        mip.solve(knapsack(layers=20, candidates=8), SolverSettings(time_limit_seconds=1e-9))
    assert not isinstance(caught.value, InfeasibleError)


def knapsack(layers, candidates, seed=0, share=0.5):
    """Two conflicting limits in six options of two choices: the relaxed and the integer optimum lie well apart."""
    generator = random.Random(seed)
    quality_loss = tuple(tuple(generator.random() for _ in range(candidates)) for _ in range(layers))

    def option(number):
        grids = [tuple(tuple(1 - d * generator.random() for d in row) for row in quality_loss) for _ in range(2)]
        low, high = (sum(pick(row) for row in grids[0]) for pick in (min, max))
        bound = low + share * (high - low) * generator.uniform(0.6, 1.0)
        return Option(f"o{number}", tuple(Limit(name, grid, 0.0, bound) for name, grid in zip("ab", grids)))

    options = [option(number) for number in range(6)]
    return ChoiceProblem(quality_loss, (), (tuple(options[:3]), tuple(options[3:])))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.slow
def test_first_programs_without_the_candidates_that_matter(seed):
    """The optimum is that with all candidates in the first program, which the tests above compare with enumeration."""
    problem = knapsack(layers=12, candidates=8, seed=seed, share=0.7)
    optima = set()
    for columns in (1, 2, 8):
        with mock.patch.object(tree, "FIRST_COLUMNS", columns):
            optima.add(round(mip.solve(problem)[0].quality_loss, 9))
    assert len(optima) == 1


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_quality_losses_of_fifteen_decades(data):
    """A user forbids a block with a huge quality loss: small differences are still resolved and proven."""
    quality_loss = tuple(
        tuple(data.draw(st.sampled_from([1e-6, 1.5e-6, 3e-5, 1e-4, 0.02, 0.5, 3.0, 1e3, 1e7, 1e9])) for _ in range(4))
        for _ in range(5)
    )
    cost = tuple(tuple(data.draw(st.integers(0, 9)) for _ in range(4)) for _ in range(5))
    bound = sum(map(min, cost)) + data.draw(st.integers(0, 12))
    problem = ChoiceProblem(quality_loss, (Limit("cost", cost, 0.0, float(bound)),))
    (solution,) = mip.solve(problem)
    assert solution.proven and solution.gap == 0 and solution.bound == solution.quality_loss
    assert solution.quality_loss == pytest.approx(brute_force(problem), rel=1e-9)


def test_alternatives_to_given_plans_are_found_without_them():
    both = mip.solve(SMALL, SolverSettings(num_solutions=2, alpha=0.5))
    (later,) = mip.solve(SMALL, SolverSettings(alpha=0.5), EarlierPlans(unlike=(both[0].chosen,)))
    assert later == both[1]
    everything = tuple(itertools.product(range(3), repeat=2))
    assert mip.solve(SMALL, SolverSettings(alpha=0.0), EarlierPlans(unlike=everything)) == []
