"""The search as a choice problem: one candidate per layer, quality losses that add up, limits on sums over layers.

Nothing here knows about models, GPUs or files; `lit_puzzle.search.program` states a search in these types, and
`lit_puzzle.search.solver.mip` and `lit_puzzle.search.solver.baselines` solve it.

    minimize    sum_l quality_loss[l][x_l]
    subject to  constant_r + sum_l coefficient_r[l][x_l] + table_r(counts(x)) <= bound_r     for every limit r,
                and, of every choice, all limits of at least one option    (one deployment and batch of a scenario),
                and labels[l][x_l] equal in all layers                     when `labels` are given.

Few limits have a table: what the number of layers of each kind adds (`lit_puzzle.search.solver.counts`).

Every total is computed again in plain Python from these numbers; a total that a solver reports is never used.

Source: arXiv 2411.19146, its section on mixed-integer programming.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from lit_puzzle.search.solver.counts import CountTable

Grid = Sequence[Sequence[float]]

RELATIVE_TOLERANCE = 1e-9  # of a bound: what rounding may add to a sum that meets it exactly


class InfeasibleError(ValueError):
    """No plan was found within the limits.

    Attributes:
        chosen: the plan with the smallest excess, one candidate per layer; None when there is none to show.
        options: its option of every choice.
        needs: for every limit that is exceeded, the pair (needed, allowed) in the user's unit. Needed is the total of
            `chosen`; where several limits cannot be met even alone, the total of the cheapest plan for each.
        proven: whether there is no plan at all; a baseline can only say that it found none.
    """

    def __init__(
        self,
        message: str,
        chosen: tuple[int, ...] | None = None,
        options: tuple[int, ...] = (),
        needs: dict[str, tuple[float, float]] | None = None,
        proven: bool = True,
    ) -> None:
        super().__init__(message)
        self.chosen, self.options, self.needs, self.proven = chosen, options, needs or {}, proven


class DisagreementError(RuntimeError):
    """The solver's totals differ from those of the plan that it returned."""


class OutOfTimeError(ValueError):
    """The time limit was reached before a plan was found or proven not to exist."""


@dataclass(frozen=True)
class Limit:
    """An upper bound on a sum over the layers.

    Attributes:
        name: what is bounded and where, in the user's words, for messages.
        coefficients: what each candidate of each layer adds; `math.inf` forbids it.
        constant: what the model adds outside its layers.
        bound: upper bound on constant plus layers.
        key: the kind of quantity, for the check of totals.
        numerator: given where the user bounds a rate from below, numerator / bound; the rate of a total is then
            numerator / total.
        table: what the numbers of layers of each kind add; None: nothing.
        hard: whether it defines what a plan is, so that the smallest relaxation must not exceed it.
    """

    name: str
    coefficients: Grid
    constant: float
    bound: float
    key: str = ""
    numerator: float | None = None
    table: CountTable | None = None
    hard: bool = False

    def total(self, chosen: Sequence[int]) -> float:
        """Return the sum of a plan."""
        counted = 0.0 if self.table is None else self.table.value(chosen)
        return math.fsum([self.constant, counted, *(row[index] for row, index in zip(self.coefficients, chosen))])

    def change(self, chosen: Sequence[int], layer: int, index: int) -> float:
        """Return what the sum of a plan changes by when a layer takes another candidate."""
        row = self.coefficients[layer]
        change = row[index] - row[chosen[layer]]
        if self.table is None or self.table.kinds[layer][index] == self.table.kinds[layer][chosen[layer]]:
            return change
        other = [*chosen[:layer], index, *chosen[layer + 1 :]]
        return change + self.table.value(other) - self.table.value(chosen)

    @property
    def tolerance(self) -> float:
        """By how much a total may exceed the bound: rounding, in the scale of the numbers added."""
        scale = max(abs(self.bound), abs(self.constant))
        if self.table is not None:
            scale = max(scale, max(map(abs, self.table.values.values())))
        if scale == 0:
            scale = max((abs(value) for row in self.coefficients for value in row if value != math.inf), default=0.0)
        return RELATIVE_TOLERANCE * scale

    def holds(self, chosen: Sequence[int]) -> bool:
        """Return whether a plan is within the bound."""
        return self.total(chosen) <= self.bound + self.tolerance

    def in_user_unit(self, total: float) -> float:
        """Return a total, or the bound, in the unit in which the user gave the bound."""
        return total if self.numerator is None else self.numerator / total

    def excess(self, chosen: Sequence[int]) -> float:
        """Return how far a plan exceeds the bound, relative to the bound; 0 when it is within it."""
        if self.holds(chosen):
            return 0.0
        return (self.total(chosen) - self.bound) / (abs(self.bound) or 1.0)


@dataclass(frozen=True)
class Option:
    """One way to satisfy a choice: one deployment and batch size of a scenario.

    Attributes:
        name: deployment and batch size in words, for messages.
        limits: limits that all hold when this option is taken.
    """

    name: str
    limits: tuple[Limit, ...]


@dataclass(frozen=True)
class Traits:
    """What the candidates are, for the baselines; grids like `ChoiceProblem.quality_loss`.

    Attributes:
        experts: expert count of every candidate.
        windows: window in tokens, None for full attention.
        parameters: parameter count.
    """

    experts: Sequence[Sequence[int]]
    windows: Sequence[Sequence[int | None]]
    parameters: Grid


@dataclass(frozen=True)
class ChoiceProblem:
    """A whole search; the formulation is above.

    Attributes:
        quality_loss: quality loss of every candidate of every layer; candidate 0 is the parent's own block.
        limits: limits of every plan.
        choices: the options of each scenario, of which at least one must hold.
        labels: labels of the candidates; all layers of a plan have the same label (uniform expert counts).
        traits: what the candidates are; only the baselines `uniform` and `max_parameters` use it.

    Raises:
        ValueError: a layer has no candidate, a grid has another shape, a number is not finite, or a choice has no
            option.
    """

    quality_loss: Grid
    limits: tuple[Limit, ...] = ()
    choices: tuple[tuple[Option, ...], ...] = ()
    labels: Sequence[Sequence[Hashable]] | None = None
    traits: Traits | None = None

    def __post_init__(self) -> None:
        shape = [len(row) for row in self.quality_loss]
        if not shape or 0 in shape:
            raise ValueError(
                f"ChoiceProblem: every layer needs at least one candidate, got {shape} candidates per layer"
            )
        if not all(math.isfinite(value) for row in self.quality_loss for value in row):
            raise ValueError("ChoiceProblem: every quality loss must be a finite number")
        if self.labels is not None and [len(row) for row in self.labels] != shape:
            raise ValueError("ChoiceProblem: labels must have one label for every candidate of every layer")
        for position, options in enumerate(self.choices):
            if not options:
                raise ValueError(
                    f"ChoiceProblem: choice {position} has no option; give at least one deployment and batch"
                )
        for limit in self.every_limit():
            _check_limit(limit, shape)

    def every_limit(self) -> Iterator[Limit]:
        """Iterate over all limits, those of every option included."""
        yield from self.limits
        for options in self.choices:
            for option in options:
                yield from option.limits

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.quality_loss)

    def total_quality_loss(self, chosen: Sequence[int]) -> float:
        """Return the quality loss of a plan."""
        return math.fsum(row[index] for row, index in zip(self.quality_loss, chosen))

    def common_labels(self) -> list[Hashable]:
        """Return the labels that every layer offers, in the order of the first layer; empty without labels."""
        if self.labels is None:
            return []
        offered = [set(row) for row in self.labels]
        return [label for label in dict.fromkeys(self.labels[0]) if all(label in layer for layer in offered)]

    def has_one_label(self, chosen: Sequence[int]) -> bool:
        """Return whether all layers of a plan have the same label; True without labels."""
        return self.labels is None or len({row[index] for row, index in zip(self.labels, chosen)}) == 1

    def option_that_holds(self, choice: int, chosen: Sequence[int]) -> int | None:
        """Return the first option of a choice that a plan satisfies, or None."""
        for index, option in enumerate(self.choices[choice]):
            if all(limit.holds(chosen) for limit in option.limits):
                return index
        return None

    def options_that_hold(self, chosen: Sequence[int]) -> tuple[int, ...] | None:
        """Return one option of every choice when the plan is within all limits, else None."""
        if not self.has_one_label(chosen) or not all(limit.holds(chosen) for limit in self.limits):
            return None
        found = [self.option_that_holds(choice, chosen) for choice in range(len(self.choices))]
        return None if None in found else tuple(index for index in found if index is not None)


def _check_limit(limit: Limit, shape: list[int]) -> None:
    if [len(row) for row in limit.coefficients] != shape:
        raise ValueError(f"Limit {limit.name!r}: it must have one coefficient for every candidate of every layer")
    numbers = [value for row in limit.coefficients for value in row if value != math.inf]
    if limit.table is not None:
        numbers += limit.table.values.values()
    if not all(math.isfinite(value) for value in (*numbers, limit.constant, limit.bound)):
        raise ValueError(
            f"Limit {limit.name!r}: its numbers must be finite (a coefficient of math.inf forbids a candidate)"
        )


@dataclass(frozen=True)
class Solution:
    """A plan of a `ChoiceProblem`.

    Attributes:
        chosen: index of the candidate of every layer.
        quality_loss: sum of their quality losses.
        options: index of the option of every choice.
        bound: lower bound on the quality loss of any plan; None from a solver that proves none.
        gap: (quality_loss - bound) / |quality_loss|; 0 when they are equal, None without a bound.
        proven: whether the gap is within the relative gap of the settings.
    """

    chosen: tuple[int, ...]
    quality_loss: float
    options: tuple[int, ...]
    bound: float | None = None
    gap: float | None = None
    proven: bool = False

    def with_bound(self, bound: float, relative_gap: float) -> Solution:
        """Return the plan with a lower bound; it is proven when its gap is at most `relative_gap`."""
        if bound == self.quality_loss:
            gap = 0.0
        else:
            gap = (self.quality_loss - bound) / abs(self.quality_loss) if self.quality_loss else math.inf
        return replace(self, bound=bound, gap=gap, proven=gap <= relative_gap * (1 + RELATIVE_TOLERANCE))
