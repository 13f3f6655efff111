"""Rewards of the length and the end of one completion, in the form of `lit_puzzle.rl.rewards`: from -1 to 0.

    LengthLimit   -ramp(n, start * m, end * m)                 one limit for all efforts, in multiples of m
    Budget        -ramp(n, factor * m, (factor + ramp) * m)    a factor for every effort
    Overlong      -ramp(n, cap - buffer, cap)                  before the cap on generated tokens
    Looping       -1 for a completion that ends in a loop (`lit_puzzle.environments.looping`)

    ramp(n, a, b) = clip((n - a) / (b - a), 0, 1)
    n = generated tokens, end token included; m = the parent's mean generated tokens at that effort, as its evaluation
    measured it once (`generation_lengths.json`)

With `mean_ramp`, a budget counts only as far as the effort's mean is above it (`lit_puzzle.rl.shared_rewards`).

Reads `generation_lengths.json`; writes nothing.
Source: the ramp is the soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), which `Overlong` is, with
L_max = cap and L_cache = buffer; the other two put it where the parent's lengths are. arXiv 2602.11937 limits length in
RL recovery implicitly, by training at all efforts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_puzzle.environments.looping import is_looping
from lit_puzzle.evaluate.length_score import length_score
from lit_puzzle.generation.lengths import LengthStatistics, read_lengths
from lit_puzzle.rl.length_settings import BudgetSettings


def ramp(tokens: float, start: float, end: float) -> float:
    """Return 0 up to `start`, 1 from `end` on, and a line between them."""
    return min(max((tokens - start) / (end - start), 0.0), 1.0)


def over_limits(
    completion_ids: Sequence[Sequence[int]], effort: Sequence[str], start: Mapping[str, float], end: Mapping[str, float]
) -> list[float]:
    """Return the penalty of each completion beyond the limits of its effort, from 0 down to -1."""
    rows = zip(completion_ids, effort, strict=True)
    return [0.0 - ramp(len(ids), start[level], end[level]) for ids, level in rows]


@dataclass(frozen=True)
class LengthLimit:
    """0.0 up to `start_tokens[effort]`, then falling linearly to -1.0 at `end_tokens[effort]`."""

    start_tokens: dict[str, float]
    end_tokens: dict[str, float]
    __name__ = "length_limit"

    def __call__(self, *, completion_ids: list[list[int]], effort: list[str], **columns: Any) -> list[float]:
        """Return the reward of the length of each completion."""
        return over_limits(completion_ids, effort, self.start_tokens, self.end_tokens)


@dataclass(frozen=True)
class Budget:
    """0.0 within the budget of the effort, then falling linearly to -1.0.

    Attributes:
        start_tokens: budget of each effort.
        end_tokens: tokens of -1.0.
        full_mean_tokens: mean tokens of the effort from which on all of this counts, nothing at the budget and below
            (`lit_puzzle.rl.shared_rewards`); empty: it counts always.
    """

    start_tokens: dict[str, float]
    end_tokens: dict[str, float]
    full_mean_tokens: dict[str, float] = field(default_factory=dict)
    __name__ = "budget"

    def __call__(self, *, completion_ids: list[list[int]], effort: list[str], **columns: Any) -> list[float]:
        """Return the reward of the length of each completion."""
        return over_limits(completion_ids, effort, self.start_tokens, self.end_tokens)


@dataclass(frozen=True)
class Overlong:
    """0.0 until `buffer_tokens` before the cap, then falling linearly to -1.0 at the cap."""

    max_new_tokens: int
    buffer_tokens: int
    __name__ = "overlong"

    def __call__(self, *, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Return the reward of the length of each completion."""
        start = self.max_new_tokens - self.buffer_tokens
        return [0.0 - ramp(len(ids), start, self.max_new_tokens) for ids in completion_ids]


@dataclass(frozen=True)
class Looping:
    """-1.0 for a completion that ends in a loop."""

    __name__ = "looping"

    def __call__(self, *, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Return the reward of each completion."""
        return [0.0 - is_looping(ids) for ids in completion_ids]


def parents_tokens(folder: Path, efforts: Sequence[str]) -> dict[str, float]:
    """Return the parent's mean generated tokens at each effort.

    Args:
        folder: folder with the parent's `generation_lengths.json`.
        efforts: efforts that are needed.

    Raises:
        ValueError: the folder does not give a positive length at every effort.
    """
    lengths = read_lengths(folder)
    missing = [effort for effort in efforts if effort not in lengths]
    if missing:
        raise ValueError(f"{folder} gives the parent's lengths for {sorted(lengths)}, not for {missing}.")
    empty = [effort for effort in efforts if lengths[effort].mean <= 0]
    if empty:
        raise ValueError(f"{folder} gives the parent 0 tokens at {empty}; nothing can be limited to multiples of that.")
    return {effort: lengths[effort].mean for effort in efforts}


def budget_score(
    values: Mapping[str, float], settings: BudgetSettings, parent: Mapping[str, LengthStatistics]
) -> float:
    """Return by what the best weights are chosen: accuracy, minus how far the longest effort lies beyond its limit.

        score = accuracy - max(0, max over efforts of n / (best_within * m) - 1)

    Args:
        values: `val/accuracy` and `val/tokens/<effort>` (n) of a validation.
        settings: the limit; without a weight the score is the accuracy.
        parent: the parent's lengths (m); efforts that it does not have are not limited.
    """
    return length_score(values, settings.best_within if settings.weight > 0 else None, parent)


def length_limit(start: float, end: float, parent_tokens: Mapping[str, float]) -> LengthLimit:
    """Return a limit from `start` to `end` times the parent's mean tokens at each effort."""
    return LengthLimit(
        start_tokens={effort: start * mean for effort, mean in parent_tokens.items()},
        end_tokens={effort: end * mean for effort, mean in parent_tokens.items()},
    )


def budget(settings: BudgetSettings, parent_tokens: Mapping[str, float]) -> Budget:
    """Return the budgets of the efforts, in tokens."""
    factors = settings.factors()

    def tokens(above: float) -> dict[str, float]:
        return {effort: (factors[effort] + above) * mean for effort, mean in parent_tokens.items()}

    return Budget(tokens(0.0), tokens(settings.ramp), tokens(settings.mean_ramp) if settings.mean_ramp > 0 else {})
