"""Reward functions: lists in, one float per completion out, in the form that TRL calls; picklable and without state.

TRL passes `completions` decoded without special tokens, which hides the channels and the end token; so these rewards
decode `completion_ids` (token lists without padding) themselves. Every other argument is a column of the prompts:
`answer`, `environment`, `effort`. The completions of one prompt may be spread over processes: each reward looks at one
completion only. TRL logs a reward under the callable's `__name__`.

Correctness  r = verify(completion, answer) in {0, 1}
Finished     r = 1 if the completion ends by <|return|> in a final channel, else 0
LengthLimit  r = -clip((n - start * m) / ((end - start) * m), 0, 1)
             n = generated tokens, m = the parent's mean generated tokens at that effort

Reads: `generation_lengths.json` of the child's folder (only for the length limit). Writes: nothing.
Source: arXiv 2602.11937 limits length in RL recovery; the linear ramp is the soft overlong penalty of DAPO
(arXiv 2503.14476, equation 13) with limits relative to the parent instead of the context length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_puzzle.environments.answers import final_text
from lit_puzzle.environments.environment import Environment
from lit_puzzle.generation.lengths import read_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


RewardFunction = Callable[..., list[float]]


@dataclass(frozen=True)
class RewardSettings:
    """Weights of the rewards; a weight of 0 leaves that reward out.

    Args:
        correctness: weight of a right answer.
        finished: weight of ending by ``<|return|>`` inside a final channel.
        length: weight of the length limit.
        length_start: multiple of the parent's mean length at which the length limit starts to cost.
        length_end: multiple at which it costs its full weight.
    """

    correctness: float = 1.0
    finished: float = 0.0
    length: float = 0.0
    length_start: float = 1.0
    length_end: float = 2.0

    def __post_init__(self) -> None:
        weights = {"correctness": self.correctness, "finished": self.finished, "length": self.length}
        if min(weights.values()) < 0 or max(weights.values()) == 0:
            raise ValueError(f"Reward weights {weights} were given; none may be negative and one must be positive.")
        if not 0 <= self.length_start < self.length_end:
            raise ValueError(
                f"length_start {self.length_start} and length_end {self.length_end} were given; "
                "0 <= length_start < length_end is needed, in multiples of the parent's mean length."
            )


@dataclass(frozen=True)
class Correctness:
    """1.0 for a right answer, by the environment that asked."""

    environments: tuple[Environment, ...]
    tokenizer: "PreTrainedTokenizerBase"
    __name__ = "correctness"

    def __call__(
        self,
        *,
        completion_ids: list[list[int]],
        answer: list[str],
        environment: list[str],
        **columns: Any,
    ) -> list[float]:
        """Verifies each completion."""
        by_name = {known.name: known for known in self.environments}
        unknown = sorted(set(environment) - set(by_name))
        if unknown:
            raise ValueError(f"Prompts of environments {unknown} were given; the reward knows {sorted(by_name)}.")
        texts = decode(self.tokenizer, completion_ids)
        rows = zip(texts, answer, environment, strict=True)
        return [by_name[name].verify(text, right) for text, right, name in rows]


@dataclass(frozen=True)
class Finished:
    """1.0 for a completion that ends by itself in a final channel."""

    tokenizer: "PreTrainedTokenizerBase"
    __name__ = "finished"

    def __call__(self, *, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Looks at the end of each completion."""
        return [float(final_text(text) is not None) for text in decode(self.tokenizer, completion_ids)]


@dataclass(frozen=True)
class LengthLimit:
    """0.0 up to `start_tokens[effort]`, falling linearly to -1.0 at `end_tokens[effort]` and beyond."""

    start_tokens: dict[str, float]
    end_tokens: dict[str, float]
    __name__ = "length_limit"

    def __call__(self, *, completion_ids: list[list[int]], effort: list[str], **columns: Any) -> list[float]:
        """Counts the tokens of each completion."""
        rewards = []
        for ids, level in zip(completion_ids, effort, strict=True):
            start, end = self.start_tokens[level], self.end_tokens[level]
            rewards.append(0.0 - min(max((len(ids) - start) / (end - start), 0.0), 1.0))
        return rewards


def decode(tokenizer: "PreTrainedTokenizerBase", completion_ids: Sequence[Sequence[int]]) -> list[str]:
    """Token lists -> texts with special tokens."""
    return [str(tokenizer.decode(list(ids), skip_special_tokens=False)) for ids in completion_ids]


def build_rewards(
    settings: RewardSettings,
    environments: Sequence[Environment],
    tokenizer: "PreTrainedTokenizerBase",
    efforts: Sequence[str],
    child: Path,
) -> tuple[list[RewardFunction], list[float]]:
    """The reward functions with positive weight, and these weights, in the same order.

    Args:
        settings: weights and limits.
        environments: the environments whose problems are asked.
        tokenizer: the policy's tokenizer.
        efforts: the efforts that are asked; the parent's length at each must be known if length is limited.
        child: the child's folder, which carries the parent's lengths (read only if length is limited).

    Raises:
        ValueError: length is limited and the folder does not say how long the parent's answers are at every effort.
    """
    weighted: list[tuple[RewardFunction, float]] = [
        (Correctness(tuple(environments), tokenizer), settings.correctness),
        (Finished(tokenizer), settings.finished),
    ]
    if settings.length > 0:
        weighted.append((length_limit(settings, efforts, child), settings.length))
    used = [(function, weight) for function, weight in weighted if weight > 0]
    return [function for function, _ in used], [weight for _, weight in used]


def length_limit(settings: RewardSettings, efforts: Sequence[str], child: Path) -> LengthLimit:
    """The length limit relative to the parent's mean lengths in the child's folder."""
    lengths = read_lengths(child)
    missing = [effort for effort in efforts if effort not in lengths]
    if missing:
        raise ValueError(f"{child} gives the parent's lengths for {sorted(lengths)}, not for {missing}.")
    means = {effort: lengths[effort].mean for effort in efforts}
    return LengthLimit(
        start_tokens={effort: settings.length_start * mean for effort, mean in means.items()},
        end_tokens={effort: settings.length_end * mean for effort, mean in means.items()},
    )
