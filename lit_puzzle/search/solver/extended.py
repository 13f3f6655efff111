"""Tables over counts in a linear program: one more layer, whose candidates are the counts that a plan can have.

    z_v in {0, 1},  sum over v of z_v = 1                          (one more layer, without quality loss)
    sum over layers and candidates of kind t of x = sum over v of v_t z_v        for every kind t
    coefficient of z_v in a limit: its table's value at v

Every table then is linear, and all solvers of choice problems apply as they are. Plans lose the last candidate again.

Reads and writes nothing. Source: this project's own; the tables are those of `lit_puzzle.search.solver.counts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lit_puzzle.search.solver.choices import ChoiceProblem, Limit, Option, Solution
from lit_puzzle.search.solver.counts import Counts, CountTable


def table_of(problem: ChoiceProblem) -> CountTable | None:
    """Return one of the problem's tables; all have the same kinds and counts. None where there is none."""
    return next((limit.table for limit in problem.every_limit() if limit.table is not None), None)


def extended(problem: ChoiceProblem) -> ChoiceProblem:
    """Return the problem with a layer for the counts, without tables and labels; itself where it has no table."""
    table = table_of(problem)
    if table is None:
        return problem
    counts = tuple(table.values)
    limits = (*(extended_limit(limit, counts) for limit in problem.limits), *_links(table, counts))
    options = tuple(
        tuple(Option(o.name, tuple(extended_limit(limit, counts) for limit in o.limits)) for o in options)
        for options in (*problem.choices, *label_choice(problem))
    )
    return ChoiceProblem((*problem.quality_loss, (0.0,) * len(counts)), limits, options)


def label_choice(problem: ChoiceProblem) -> tuple[tuple[Option, ...], ...]:
    """Return labels as one more choice: an option per label, which forbids every candidate of another label."""
    if problem.labels is None:
        return ()
    options = []
    for label in problem.common_labels():
        grid = [[0.0 if other == label else math.inf for other in row] for row in problem.labels]
        options.append(Option(f"{label} everywhere", (Limit(f"{label} everywhere", grid, 0.0, 0.0),)))
    return (tuple(options),)


def extended_limit(limit: Limit, counts: Sequence[Counts]) -> Limit:
    """Return a limit with its table as the coefficients of the layer for the counts."""
    last = (0.0,) * len(counts) if limit.table is None else tuple(limit.table.values[key] for key in counts)
    return replace(limit, coefficients=(*limit.coefficients, last), table=None)


def extended_plan(problem: ChoiceProblem, chosen: Sequence[int]) -> tuple[int, ...]:
    """Return a plan with the candidate of the layer for the counts; itself where the problem has no table."""
    table = table_of(problem)
    return tuple(chosen) if table is None else (*chosen, list(table.values).index(table.counts(chosen)))


def restored(problem: ChoiceProblem, solution: Solution) -> Solution:
    """Return a solution of the extended problem as one of the problem itself."""
    if table_of(problem) is None:
        return solution
    return replace(solution, chosen=solution.chosen[:-1], options=solution.options[: len(problem.choices)])


def _links(table: CountTable, counts: Sequence[Counts]) -> list[Limit]:
    """Return the equalities between plans and counts, two limits each; the last kind's follows from the others."""
    found = []
    for place, kind in enumerate(table.order[:-1]):
        for sign in (1.0, -1.0):
            rows = [tuple(sign * (other == kind) for other in row) for row in table.kinds]
            last = tuple(-sign * key[place] for key in counts)
            found.append(Limit(f"layers of kind {kind}", (*rows, last), 0.0, 0.0, "counts", hard=True))
    return found
