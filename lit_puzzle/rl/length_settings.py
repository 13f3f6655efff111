"""Settings of the rewards of lengths and endings, as recipes hold them. Imports no torch; reads, writes nothing.

Each has a weight, its factor in the sum of rewards; 0 leaves it out. What they compute: `lit_puzzle.rl.length_rewards`
(one completion) and `lit_puzzle.rl.shared_rewards` (a completion among others).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lit_puzzle.environments.environment import LEVELS


@dataclass(frozen=True)
class BudgetSettings:
    """A budget of tokens for every effort, relative to what the parent spends there.

    Args:
        weight: factor in the sum of rewards.
        low: budget at low effort, as a multiple of the parent's mean tokens at low effort.
        medium: the same at medium effort.
        high: the same at high effort.
        none: the same of a model without levels of effort.
        ramp: multiple of the parent's mean tokens over which the penalty grows from 0, at the budget, to 1.
        mean_ramp: 0: every completion beyond the budget is penalized. Above 0: as far as the mean of the effort's
            completions in the generation batch is beyond the budget, in full from this multiple of the parent's mean
            tokens above it.
        best_within: validations choose the best weights among those that keep every effort within this multiple of the
            parent's mean tokens (`val/score`), whatever the budgets.
        parent: folder with the parent's `generation_lengths.json`: the run folder of an evaluation of the parent;
            default: the child's folder.

    Raises:
        ValueError: numbers out of range.
    """

    weight: float = 0.0
    low: float = 1.0
    medium: float = 1.0
    high: float = 1.0
    none: float = 1.0
    ramp: float = 1.0
    mean_ramp: float = 0.0
    best_within: float = 1.1
    parent: Path | None = None

    def __post_init__(self) -> None:
        check_weights("rewards.budget", {"weight": self.weight})
        given = self.factors() | {"ramp": self.ramp, "best_within": self.best_within}
        if not all(0 < number < math.inf for number in given.values()):
            raise ValueError(
                f"rewards.budget: {_listed(given)} were given; all are multiples of the parent's mean tokens, positive "
                "and finite."
            )
        if not 0 <= self.mean_ramp < math.inf:
            raise ValueError(
                f"rewards.budget.mean_ramp={self.mean_ramp} was given; it is 0 (every completion beyond the budget is "
                "penalized), or positive and finite."
            )

    def factors(self) -> dict[str, float]:
        """Return the budget of every effort, in multiples of the parent's mean tokens."""
        return dict(zip(LEVELS, (self.low, self.medium, self.high, self.none), strict=True))


@dataclass(frozen=True)
class GroupLengthSettings:
    """Shorter completions of a prompt get more than longer ones of the same prompt.

    Args:
        weight: factor in the sum of rewards; below 1 (times `correctness`) a right completion always gets more than a
            wrong one.
        right_only: compares right completions with each other and leaves the others at 0; False compares all of them.

    Raises:
        ValueError: a weight out of range.
    """

    weight: float = 0.0
    right_only: bool = True

    def __post_init__(self) -> None:
        check_weights("rewards.group_length", {"weight": self.weight})


@dataclass(frozen=True)
class OverlongSettings:
    """A soft penalty before the cap on generated tokens.

    Args:
        weight: factor in the sum of rewards.
        buffer_tokens: the penalty grows from 0 to 1 over the last so many tokens before the cap.

    Raises:
        ValueError: numbers out of range.
    """

    weight: float = 0.0
    buffer_tokens: int = 16

    def __post_init__(self) -> None:
        check_weights("rewards.overlong", {"weight": self.weight})
        if self.buffer_tokens < 1:
            raise ValueError(f"rewards.overlong.buffer_tokens={self.buffer_tokens} was given; at least 1 is needed.")

    def check_cap(self, max_new_tokens: int) -> None:
        """Check that the buffer lies below the cap.

        Raises:
            ValueError: a buffer that is not shorter than the cap.
        """
        if self.weight > 0 and self.buffer_tokens >= max_new_tokens:
            raise ValueError(
                f"rewards.overlong.buffer_tokens={self.buffer_tokens} was given; it must be below "
                f"grpo.sampling.max_new_tokens={max_new_tokens}."
            )


@dataclass(frozen=True)
class EndingSettings:
    """Penalties of completions that end badly.

    Args:
        looping: weight of the penalty of completions that end in a loop.
        no_analysis: weight of the penalty of completions that answer without thinking.
        no_analysis_efforts: efforts at which that costs; at low effort answering at once may be just right.

    Raises:
        ValueError: weights out of range, or unknown efforts.
    """

    looping: float = 0.0
    no_analysis: float = 0.0
    no_analysis_efforts: tuple[str, ...] = ("medium", "high")

    def __post_init__(self) -> None:
        check_weights("rewards.endings", {"looping": self.looping, "no_analysis": self.no_analysis})
        unknown = [effort for effort in self.no_analysis_efforts if effort not in LEVELS]
        if unknown or not self.no_analysis_efforts:
            raise ValueError(
                f"rewards.endings.no_analysis_efforts={list(self.no_analysis_efforts)} was given; one or more of "
                f"{list(LEVELS)} are needed."
            )


def check_weights(place: str, weights: Mapping[str, float]) -> None:
    """Check that weights are finite and none is negative.

    Args:
        place: key of the settings, for the message.
        weights: name and weight.

    Raises:
        ValueError: the first weight that is not.
    """
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"{place}.{name}={weight} was given; a weight is finite and not negative, 0 leaves it out."
            )


def _listed(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={number}" for name, number in numbers.items())
