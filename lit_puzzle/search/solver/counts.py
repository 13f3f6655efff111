"""What a limit adds for how many layers of a plan are of each kind, as a table over all counts that plans can have.

A sum over layers cannot say what an engine's KV cache takes: layers with one window share groups that are padded to one
width, so that one window more or less can change the width of all groups. The number of layers of each kind decides it,
and there are few such counts: n + k - 1 over k - 1 for n layers that choose among k kinds (19 for 18 layers and one
window, 1330 with three).

Reads and writes nothing. `lit_puzzle.search.solver.extended` states the table in a linear program.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Kind = TypeVar("Kind", bound=Hashable)
Counts = tuple[int, ...]
MOST_COUNTS = 20_000


@dataclass(frozen=True, eq=False)
class CountTable:
    """A value for every number of layers of each kind; compared by identity.

    Attributes:
        kinds: kind of every candidate of every layer.
        order: the kinds in the order of the counts.
        values: value of every count that plans can have.
    """

    kinds: Sequence[Sequence[Hashable]]
    order: tuple[Hashable, ...]
    values: Mapping[Counts, float]

    def counts(self, chosen: Sequence[int]) -> Counts:
        """Return how many layers of a plan are of each kind."""
        taken = [row[index] for row, index in zip(self.kinds, chosen, strict=True)]
        return tuple(taken.count(kind) for kind in self.order)

    def value(self, chosen: Sequence[int]) -> float:
        """Return the value of a plan."""
        return self.values[self.counts(chosen)]


def order_of(kinds: Sequence[Sequence[Kind]]) -> tuple[Kind, ...]:
    """Return every kind once, in the order in which it comes first."""
    return tuple(dict.fromkeys(kind for row in kinds for kind in row))


def reachable(kinds: Sequence[Sequence[Hashable]]) -> list[Counts]:
    """Return every count that a plan can have, ascending.

    Raises:
        ValueError: there are more than `MOST_COUNTS`.
    """
    order = order_of(kinds)
    found: set[Counts] = {(0,) * len(order)}
    for row in kinds:
        steps = [tuple(int(kind == own) for kind in order) for own in dict.fromkeys(row)]
        found = {tuple(map(sum, zip(counts, step))) for counts in found for step in steps}
        if len(found) > MOST_COUNTS:
            raise ValueError(
                f"the layers can have more than {MOST_COUNTS:,} different counts of their {len(order)} windows; offer "
                "fewer windows, or set costs.engine.kv.allocator: ideal, which needs no counts"
            )
    return sorted(found)


def cheapest(coefficients: Sequence[Sequence[float]], table: CountTable) -> tuple[int, ...]:
    """Return the plan with the smallest sum of coefficients and value of the table, by dynamic programming over counts.

    Args:
        coefficients: what each candidate of each layer adds; `math.inf` where it must not be taken.
        table: the table.
    """
    best: dict[Counts, tuple[float, tuple[int, ...]]] = {(0,) * len(table.order): (0.0, ())}
    for row, kinds in zip(coefficients, table.kinds, strict=True):
        least = {
            kind: min((i for i in range(len(row)) if kinds[i] == kind), key=row.__getitem__) for kind in set(kinds)
        }
        after: dict[Counts, tuple[float, tuple[int, ...]]] = {}
        for counts, (total, chosen) in best.items():
            for kind, index in least.items():
                place = table.order.index(kind)
                key = (*counts[:place], counts[place] + 1, *counts[place + 1 :])
                found = total + row[index]
                if key not in after or found < after[key][0]:
                    after[key] = (found, (*chosen, index))
        best = after
    return min(best.items(), key=lambda item: item[1][0] + table.values[item[0]])[1][1]
