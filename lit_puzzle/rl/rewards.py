"""Reward functions in the form that TRL calls: lists in, one float per completion out; picklable and without state.

TRL passes `completions` decoded without special tokens, which removes the channels and the end token; so these rewards
decode `completion_ids` (token lists without padding) themselves. Every other argument is a column of the prompts:
`answer`, `environment`, `effort`. The completions of one prompt may be on several processes, so a reward depends on one
completion only. TRL logs a reward under the callable's `__name__`.

Correctness  r = verify(final text, answer) in [0, 1]
Finished     r = 1 if the completion ends after its final answer, else 0
LengthLimit  r = -clip((n - start * m) / ((end - start) * m), 0, 1)
             n = generated tokens, m = the parent's mean generated tokens at that effort

Reads `generation_lengths.json` of the child's folder (only for the length limit); writes nothing.
Source: arXiv 2602.11937 limits length in RL recovery; the linear ramp is the soft overlong penalty of DAPO
(arXiv 2503.14476, equation 13) with limits relative to the parent instead of the context length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_puzzle.environments.answer_formats import AnswerFormat, answer_format
from lit_puzzle.environments.environment import Environment
from lit_puzzle.environments.grading import Ungraded, grade_all
from lit_puzzle.generation.lengths import read_lengths
from lit_puzzle.rl.settings import ExtraReward, RewardFunction, RewardSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Correctness:
    """1.0 for a right answer, verified by the environment of the prompt."""

    environments: tuple[Environment, ...]
    tokenizer: "PreTrainedTokenizerBase"
    form: AnswerFormat
    __name__ = "correctness"

    def __call__(
        self,
        *,
        completion_ids: list[list[int]],
        answer: list[str],
        environment: list[str],
        **columns: Any,
    ) -> list[float]:
        """Return the verification of each completion.

        Raises:
            ValueError: a prompt of an unknown environment.
        """
        known = {one.name for one in self.environments}
        unknown = sorted(set(environment) - known)
        if unknown:
            raise ValueError(f"Prompts of environments {unknown} were given; the reward knows {sorted(known)}.")
        texts = decode(self.tokenizer, completion_ids)
        rows = zip(texts, answer, environment, strict=True)
        ungraded = [Ungraded(name, self.form.parse(text), right) for text, right, name in rows]
        return [verdict.correct for verdict in grade_all(self.environments, ungraded)]


@dataclass(frozen=True)
class Finished:
    """1.0 for a completion that ends by itself after its final answer."""

    tokenizer: "PreTrainedTokenizerBase"
    form: AnswerFormat
    __name__ = "finished"

    def __call__(self, *, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Return whether each completion is finished."""
        return [float(self.form.parse(text).final is not None) for text in decode(self.tokenizer, completion_ids)]


@dataclass(frozen=True)
class LengthLimit:
    """0.0 up to `start_tokens[effort]`, then falling linearly to -1.0 at `end_tokens[effort]`."""

    start_tokens: dict[str, float]
    end_tokens: dict[str, float]
    __name__ = "length_limit"

    def __call__(self, *, completion_ids: list[list[int]], effort: list[str], **columns: Any) -> list[float]:
        """Return the reward of the length of each completion."""
        rewards = []
        for ids, level in zip(completion_ids, effort, strict=True):
            start, end = self.start_tokens[level], self.end_tokens[level]
            rewards.append(0.0 - min(max((len(ids) - start) / (end - start), 0.0), 1.0))
        return rewards


def decode(tokenizer: "PreTrainedTokenizerBase", completion_ids: Sequence[Sequence[int]]) -> list[str]:
    """Return the texts of token lists, with special tokens."""
    return [str(tokenizer.decode(list(ids), skip_special_tokens=False)) for ids in completion_ids]


def build_rewards(
    settings: RewardSettings,
    extra: Sequence[ExtraReward],
    environments: Sequence[Environment],
    tokenizer: "PreTrainedTokenizerBase",
    efforts: Sequence[str],
    child: Path,
) -> tuple[list[RewardFunction], list[float]]:
    """Return the reward functions whose weight is not 0, and these weights, in the same order.

    Args:
        settings: weights and limits of the built-in rewards.
        extra: further rewards.
        environments: environments of the prompts.
        tokenizer: tokenizer of the policy.
        efforts: efforts of the prompts; the parent's length at each must be known if length is limited.
        child: folder of the child, with the parent's lengths (read only if length is limited).

    Raises:
        ValueError: length is limited and the folder does not give the parent's lengths at every effort.
    """
    form = answer_format(tokenizer)
    weighted: list[tuple[RewardFunction, float]] = [
        (Correctness(tuple(environments), tokenizer, form), settings.correctness),
        (Finished(tokenizer, form), settings.finished),
    ]
    if settings.length > 0:
        weighted.append((length_limit(settings, efforts, child), settings.length))
    weighted += [(reward.function, reward.weight) for reward in extra]
    used = [(function, weight) for function, weight in weighted if weight != 0]
    return [function for function, _ in used], [weight for _, weight in used]


def length_limit(settings: RewardSettings, efforts: Sequence[str], child: Path) -> LengthLimit:
    """Return the length limit relative to the parent's mean lengths, which the child's folder gives.

    Raises:
        ValueError: the folder does not give the parent's lengths at every effort.
    """
    lengths = read_lengths(child)
    missing = [effort for effort in efforts if effort not in lengths]
    if missing:
        raise ValueError(f"{child} gives the parent's lengths for {sorted(lengths)}, not for {missing}.")
    means = {effort: lengths[effort].mean for effort in efforts}
    return LengthLimit(
        start_tokens={effort: settings.length_start * mean for effort, mean in means.items()},
        end_tokens={effort: settings.length_end * mean for effort, mean in means.items()},
    )
