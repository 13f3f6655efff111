"""counts.py and extended.py: tables over counts against enumeration of every plan, and in every solver."""

import itertools
import math
import random
from dataclasses import replace

import pytest
from helpers.small_problems import all_plans, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_puzzle.search.solver import baselines, mip
from lit_puzzle.search.solver.choices import ChoiceProblem, InfeasibleError, Limit, Option
from lit_puzzle.search.solver.counts import MOST_COUNTS, CountTable, cheapest, order_of, reachable
from lit_puzzle.search.solver.settings import SolverSettings


def table(kinds, seed: int) -> CountTable:
    generator = random.Random(seed)
    return CountTable(kinds, order_of(kinds), {key: generator.uniform(0, 6) for key in reachable(kinds)})


def limits_hold(limits, plan) -> bool:
    """As the definition says, without the library's own sums."""
    for limit in limits:
        total = limit.constant + sum(row[index] for row, index in zip(limit.coefficients, plan))
        if limit.table is not None:
            taken = [row[index] for row, index in zip(limit.table.kinds, plan)]
            total += limit.table.values[tuple(sum(kind == t for t in taken) for kind in limit.table.order)]
        if total > limit.bound + 1e-9 * max(abs(limit.bound), 6.0):
            return False
    return True


def lowest_loss(problem: ChoiceProblem) -> float | None:
    return min(
        (
            sum(row[index] for row, index in zip(problem.quality_loss, plan))
            for plan in all_plans(problem)
            if (problem.labels is None or len({row[i] for row, i in zip(problem.labels, plan)}) == 1)
            and limits_hold(problem.limits, plan)
            and all(any(limits_hold(option.limits, plan) for option in options) for options in problem.choices)
        ),
        default=None,
    )


@st.composite
def with_tables(draw: st.DrawFn) -> ChoiceProblem:
    """Draw a problem of which one limit of every plan, and one of every option, has a table."""
    problem = draw(problems())
    kinds = tuple(tuple(draw(st.integers(0, 2)) for _ in row) for row in problem.quality_loss)

    def tabled(name: str) -> Limit:
        values = table(kinds, draw(st.integers(0, 99)))
        zeros = tuple((0.0,) * len(row) for row in problem.quality_loss)
        return Limit(name, zeros, 0.0, draw(st.sampled_from([2.0, 4.0, 6.0])), name, table=values)

    choices = tuple(
        tuple(replace(option, limits=(*option.limits, tabled("kv"))) for option in options)
        for options in problem.choices
    )
    return replace(problem, limits=(*problem.limits, tabled("all")), choices=choices)


@given(with_tables())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_equals_enumeration(problem: ChoiceProblem) -> None:
    best = lowest_loss(problem)
    if best is None:
        with pytest.raises(InfeasibleError) as caught:
            mip.solve(problem)
        assert caught.value.chosen is None or len(caught.value.chosen) == problem.num_layers
        return
    first, *others = mip.solve(problem, SolverSettings(num_solutions=3, alpha=0.6))
    assert first.proven and first.quality_loss == pytest.approx(best, abs=1e-9)
    for solution in (first, *others):
        assert len(solution.chosen) == problem.num_layers and len(solution.options) == len(problem.choices)
        assert problem.options_that_hold(solution.chosen) is not None


@given(with_tables(), st.integers(0, 20))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_a_candidate_changes_is_the_difference_of_totals(problem: ChoiceProblem, seed: int) -> None:
    generator, limit = random.Random(seed), problem.limits[-1]
    plan = [generator.randrange(len(row)) for row in problem.quality_loss]
    layer = generator.randrange(len(plan))
    index = generator.randrange(len(problem.quality_loss[layer]))
    other = [*plan[:layer], index, *plan[layer + 1 :]]
    assert limit.change(plan, layer, index) == pytest.approx(limit.total(other) - limit.total(plan), abs=1e-12)


@given(with_tables())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_cheapest_plan_of_a_table_is_that_of_all_plans(problem: ChoiceProblem) -> None:
    generator = random.Random(1)
    values = [[generator.choice([1.0, 2.5, 4.0, math.inf]) for _ in row[1:]] + [3.0] for row in problem.quality_loss]
    counts = problem.limits[-1].table
    assert counts is not None

    def total(plan) -> float:
        return sum(row[index] for row, index in zip(values, plan)) + counts.value(plan)

    assert total(cheapest(values, counts)) == pytest.approx(min(map(total, all_plans(problem))))


def test_one_more_window_can_free_what_a_sum_over_layers_does_not_show() -> None:
    """Greedy and random see the table too: a kind is only cheap in equal numbers."""
    kinds, losses = ((0, 1),) * 4, ((0.0, 1.0), (0.0, 2.0), (0.0, 3.0), (0.0, 4.0))
    values = {key: 1.0 if key[0] == 2 else 9.0 for key in reachable(kinds)}
    memory = Limit("memory", ((0.0, 0.0),) * 4, 0.0, 5.0, table=CountTable(kinds, (0, 1), values))
    problem = ChoiceProblem(losses, choices=((Option("one", (memory,)),),))
    (solution,) = mip.solve(problem)
    assert solution.chosen == (1, 1, 0, 0) and solution.proven
    assert baselines.random(problem, SolverSettings(name="random"))[0].quality_loss >= 3.0
    with pytest.raises(InfeasibleError, match="found no plan"):
        baselines.greedy(problem)  # the first window alone saves nothing


def test_counts_are_those_of_all_plans_and_not_too_many() -> None:
    kinds = ((0, 1), (2,), (0, 1, 2))
    assert reachable(kinds) == sorted(
        {tuple(plan.count(kind) for kind in (0, 1, 2)) for plan in itertools.product(*kinds)}
    )
    with pytest.raises(ValueError, match=rf"more than {MOST_COUNTS:,} different counts of their 8 windows"):
        reachable((tuple(range(8)),) * 36)
