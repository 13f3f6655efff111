"""Small random choice problems, and their solutions by enumeration of every plan, to test the solvers against."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

from hypothesis import strategies as st

from lit_puzzle.search.solver.choices import ChoiceProblem, Limit, Option

Value = TypeVar("Value")
NUMBERS = st.one_of(st.integers(0, 6).map(float), st.floats(0, 6, allow_nan=False).map(lambda value: round(value, 3)))


def all_plans(problem: ChoiceProblem) -> Iterator[tuple[int, ...]]:
    """Yield every plan, feasible or not."""
    return itertools.product(*(range(len(row)) for row in problem.quality_loss))


def within(limit: Limit, plan: Sequence[int]) -> bool:
    """Return whether a plan holds a limit, up to rounding."""
    total = limit.constant + sum(row[index] for row, index in zip(limit.coefficients, plan))
    return total <= limit.bound + 1e-9 * max(abs(limit.bound), abs(limit.constant), 1e-300)


def feasible(problem: ChoiceProblem, plan: Sequence[int]) -> bool:
    """Return whether a plan holds all limits and those of one option of every choice, with one label throughout."""
    if problem.labels is not None and len({row[index] for row, index in zip(problem.labels, plan)}) > 1:
        return False
    return all(within(limit, plan) for limit in problem.limits) and all(
        any(all(within(limit, plan) for limit in option.limits) for option in options) for options in problem.choices
    )


def brute_force(problem: ChoiceProblem, earlier: Sequence[Sequence[int]] = (), alpha: float = 1.0) -> float | None:
    """Return the lowest quality loss of all feasible plans that share few enough layers with earlier ones, or None."""
    unlike = [plan for plan in all_plans(problem) if feasible(problem, plan)]
    shared = math.floor(alpha * problem.num_layers + 1e-9)
    for other in earlier:
        unlike = [plan for plan in unlike if sum(a == b for a, b in zip(plan, other)) <= shared]
    return min((sum(row[i] for row, i in zip(problem.quality_loss, plan)) for plan in unlike), default=None)


@st.composite
def problems(draw: st.DrawFn) -> ChoiceProblem:
    """Draw a problem of two to five layers: limits tight and loose, forbidden candidates, choices, labels."""
    shape = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(2, 5)))]

    def grid(values: st.SearchStrategy[Value]) -> tuple[tuple[Value, ...], ...]:
        return tuple(tuple(draw(values) for _ in range(width)) for width in shape)

    def limit(name: str) -> Limit:
        coefficients = grid(NUMBERS)
        if draw(st.booleans()) and draw(st.booleans()):
            coefficients = tuple(
                tuple(math.inf if draw(st.integers(0, 5)) == 0 else v for v in r) for r in coefficients
            )
        constant = draw(st.sampled_from([0.0, 0.0, 1.5]))
        finite = [[value for value in row if value < math.inf] or [0.0] for row in coefficients]
        low, high = sum(map(min, finite)), sum(map(max, finite))
        share = draw(st.sampled_from([-0.05, 0.0, 0.2, 0.4, 0.6, 1.0]))  # 0.0: only the cheapest plan fits exactly
        return Limit(name, coefficients, constant, constant + low + share * (high - low))

    def option(choice: int, index: int) -> Option:
        return Option(f"o{index}", tuple(limit(f"c{choice} l{i}") for i in range(draw(st.integers(0, 2)))))

    limits = tuple(limit(f"g{i}") for i in range(draw(st.integers(0, 2))))
    choices = tuple(tuple(option(c, i) for i in range(draw(st.integers(1, 3)))) for c in range(draw(st.integers(0, 3))))
    labels = grid(st.integers(0, 1)) if draw(st.integers(0, 3)) == 0 else None
    quality_loss = grid(st.floats(-0.5, 4).map(lambda value: round(value, 2)))
    return ChoiceProblem(quality_loss, limits, choices, labels)


SMALL = ChoiceProblem(
    quality_loss=((0.0, 1.0, 3.0), (0.0, 2.0, 2.5)),
    limits=(Limit("bytes", ((9.0, 5.0, 1.0), (9.0, 6.0, 2.0)), 1.0, 12.0),),
)
