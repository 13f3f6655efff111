"""The search in numbers only: one candidate per layer, damages to add up, limits that sums must respect.

Nothing here knows about models, GPUs or files; `lit_puzzle.search.program` writes a search down in these types, and
`lit_puzzle.search.solver.mip` and `lit_puzzle.search.solver.baselines` solve it.

    minimize    sum_l damage[l][x_l]
    subject to  constant_r + sum_l coefficient_r[l][x_l] <= bound_r        for every limit r,
                and, of every choice, all limits of at least one option    (one deployment and batch of a scenario),
                and same[l][x_l] alike in all layers                       when `same` is given.

Every total in here is added up again in plain Python from these numbers: a solver's word is never taken for it.

Source: arXiv 2411.19146, its section on mixed-integer programming.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

Grid = Sequence[Sequence[float]]

RELATIVE_TOLERANCE = 1e-9  # of a bound: what rounding may add to a sum that meets it exactly


class Infeasible(ValueError):  # noqa: N818  (what the user reads is its message)
    """No plan was found within the limits.

    Attributes:
        chosen: The plan that comes nearest, one candidate per layer; None when there is none to show.
        options: Its option of every choice.
        needs: For every limit that stands in the way: (what is needed, what is allowed), as `Limit.told` counts.
            Needed is what that plan comes to; where several limits cannot be met one by one, what the cheapest plan
            for each comes to.
        proven: Whether there is no plan at all; a baseline only says that it found none.
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
    """The solver's totals are not those of the plan it returned."""


class OutOfTimeError(ValueError):
    """No plan was found in the time given, and none was ruled out."""


@dataclass(frozen=True)
class Limit:
    """An upper bound on a sum over the layers.

    Attributes:
        name: What is bounded, for messages: the user's word for it and where.
        coefficients: What each candidate of each layer adds; `math.inf` forbids it.
        constant: What the model adds outside its layers.
        bound: The most that constant and layers may come to.
        key: What kind of quantity it is, to whoever checks the totals.
        numerator: The user asked for a rate of at least numerator / bound; a total stands for numerator / total.
    """

    name: str
    coefficients: Grid
    constant: float
    bound: float
    key: str = ""
    numerator: float | None = None

    def total(self, chosen: Sequence[int]) -> float:
        """The sum that a plan comes to."""
        return math.fsum([self.constant, *(row[index] for row, index in zip(self.coefficients, chosen))])

    @property
    def tolerance(self) -> float:
        """What a total may exceed the bound by: rounding, in the scale of the numbers added."""
        scale = max(abs(self.bound), abs(self.constant))
        if scale == 0:
            scale = max((abs(value) for row in self.coefficients for value in row if value != math.inf), default=0.0)
        return RELATIVE_TOLERANCE * scale

    def holds(self, chosen: Sequence[int]) -> bool:
        """Whether a plan stays within the bound."""
        return self.total(chosen) <= self.bound + self.tolerance

    def told(self, total: float) -> float:
        """A total, or the bound, in the unit that the user asked in."""
        return total if self.numerator is None else self.numerator / total

    def excess(self, chosen: Sequence[int]) -> float:
        """How far a plan is over the bound, relative to the bound; 0 when it holds."""
        if self.holds(chosen):
            return 0.0
        return (self.total(chosen) - self.bound) / (abs(self.bound) or 1.0)


@dataclass(frozen=True)
class Option:
    """One way to satisfy a choice: all its limits together (one deployment and batch size of one scenario)."""

    name: str
    limits: tuple[Limit, ...]


@dataclass(frozen=True)
class Traits:
    """What the candidates are, for the baselines; grids like `ChoiceProblem.quality_loss`.

    Attributes:
        experts: Expert count of every candidate.
        windows: Window in tokens, None for full attention.
        parameters: Parameter count.
    """

    experts: Sequence[Sequence[int]]
    windows: Sequence[Sequence[int | None]]
    parameters: Grid


@dataclass(frozen=True)
class ChoiceProblem:
    """A whole search.

    Attributes:
        damage: Damage of every candidate of every layer; candidate 0 is the parent's own block.
        limits: Bounds that always hold.
        choices: For each scenario its options, of which at least one must hold.
        same: Labels of the candidates; a plan takes the same label in every layer (uniform expert counts).
        traits: What the candidates are; only the baselines `uniform` and `max_parameters` read it.
    """

    quality_loss: Grid
    limits: tuple[Limit, ...] = ()
    choices: tuple[tuple[Option, ...], ...] = ()
    same: Sequence[Sequence[Hashable]] | None = None
    traits: Traits | None = None

    def __post_init__(self) -> None:
        shape = [len(row) for row in self.quality_loss]
        if not shape or 0 in shape:
            raise ValueError(f"Problem: every layer needs at least one candidate, got {shape} candidates per layer")
        if not all(math.isfinite(value) for row in self.quality_loss for value in row):
            raise ValueError("Problem: every damage must be a finite number")
        if self.same is not None and [len(row) for row in self.same] != shape:
            raise ValueError("Problem: `same` needs one label for every candidate of every layer")
        for position, options in enumerate(self.choices):
            if not options:
                raise ValueError(f"Problem: choice {position} has no option; give at least one deployment and batch")
        for limit in self.every_limit():
            _check_limit(limit, shape)

    def every_limit(self) -> Iterator[Limit]:
        """All limits, those of every option included."""
        yield from self.limits
        for options in self.choices:
            for option in options:
                yield from option.limits

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.quality_loss)

    def total_quality_loss(self, chosen: Sequence[int]) -> float:
        """The damage of a plan, added up."""
        return math.fsum(row[index] for row, index in zip(self.quality_loss, chosen))

    def labels(self) -> list[Hashable]:
        """Labels of `same` that every layer offers, in the order of the first layer; empty without `same`."""
        if self.same is None:
            return []
        offered = [set(row) for row in self.same]
        return [label for label in dict.fromkeys(self.same[0]) if all(label in layer for layer in offered)]

    def one_label(self, chosen: Sequence[int]) -> bool:
        """Whether a plan satisfies `same`."""
        return self.same is None or len({row[index] for row, index in zip(self.same, chosen)}) == 1

    def option_that_holds(self, choice: int, chosen: Sequence[int]) -> int | None:
        """The first option of a choice that a plan satisfies."""
        for index, option in enumerate(self.choices[choice]):
            if all(limit.holds(chosen) for limit in option.limits):
                return index
        return None

    def options_that_hold(self, chosen: Sequence[int]) -> tuple[int, ...] | None:
        """One option of every choice when the plan is within all limits, else None."""
        if not self.one_label(chosen) or not all(limit.holds(chosen) for limit in self.limits):
            return None
        found = [self.option_that_holds(choice, chosen) for choice in range(len(self.choices))]
        return None if None in found else tuple(index for index in found if index is not None)


def _check_limit(limit: Limit, shape: list[int]) -> None:
    if [len(row) for row in limit.coefficients] != shape:
        raise ValueError(f"Limit {limit.name!r}: needs one coefficient for every candidate of every layer")
    numbers = [value for row in limit.coefficients for value in row if value != math.inf]
    if not all(math.isfinite(value) for value in (*numbers, limit.constant, limit.bound)):
        raise ValueError(f"Limit {limit.name!r}: its numbers must be finite (a coefficient may be math.inf: forbidden)")


@dataclass(frozen=True)
class Settings:
    """How to search, the same for every solver.

    Attributes:
        num_solutions: Plans wanted, best first, each unlike those before it.
        alpha: A later plan shares at most this part of its layers with each earlier one.
        time_limit_seconds: Wall clock for all of them together.
        relative_gap: Stop once the damage is proven to be within this part of the optimum.
        seed: For the solver `random`.
        known: A plan from elsewhere; the exact search starts from its damage when it is within all limits.
        unlike: Plans that every plan wanted must differ from, as `alpha` says.
    """

    num_solutions: int = 1
    alpha: float = 0.8
    time_limit_seconds: float = 60.0
    relative_gap: float = 0.0
    seed: int = 0
    known: tuple[int, ...] | None = None
    unlike: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.num_solutions < 1:
            raise ValueError(f"num_solutions must be at least 1, got {self.num_solutions}")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha must be at least 0 and below 1 (1 would give the same plan again): {self.alpha}")
        if not self.time_limit_seconds > 0:
            raise ValueError(f"time_limit_seconds must be positive, got {self.time_limit_seconds}")
        if not 0 <= self.relative_gap < 1:
            raise ValueError(f"relative_gap must be at least 0 and below 1, got {self.relative_gap}")


@dataclass(frozen=True)
class Solution:
    """A plan in numbers.

    Attributes:
        chosen: Index of the candidate of every layer.
        damage: Sum of their damages.
        options: Index of the option of every choice.
        bound: No plan is better than this; None from a solver that proves nothing.
        gap: (damage - bound) / |damage|; 0 when they agree, None without a bound.
        proven: Whether the gap is within what was asked for.
    """

    chosen: tuple[int, ...]
    quality_loss: float
    options: tuple[int, ...]
    bound: float | None = None
    gap: float | None = None
    proven: bool = False

    def with_bound(self, bound: float, relative_gap: float) -> Solution:
        """The same plan with what is proven of it; `relative_gap` is what may be left unproven."""
        gap = (
            0.0
            if bound == self.quality_loss
            else (self.quality_loss - bound) / abs(self.quality_loss)
            if self.quality_loss
            else math.inf
        )
        return replace(self, bound=bound, gap=gap, proven=gap <= relative_gap * (1 + RELATIVE_TOLERANCE))


Solver = Callable[[ChoiceProblem, Settings], list[Solution]]  # the exact search and every baseline
