"""Reward functions in the form that TRL calls: lists in, one float per completion out; picklable and without state.

TRL passes `completions` decoded without special tokens, which removes the channels and the end token; so these rewards
decode `completion_ids` (token lists without padding) themselves. Every other argument is a column of the prompts:
`answer`, `environment`, `effort`. The completions of one prompt may be on several processes, so a reward depends on one
completion only; `lit_puzzle.rl.shared_rewards` compares those of all processes afterwards. TRL logs a reward under the
callable's `__name__`.

Correctness  r = verify(final text, answer) in [0, 1]
Finished     r = 1 if the completion ends after its final answer, else 0
NoAnalysis   r = -1 if nothing is thought before the answer, at efforts where it should be, else 0
Rewards of lengths: `lit_puzzle.rl.length_rewards`, `lit_puzzle.rl.shared_rewards`.

Reads `generation_lengths.json` (only where lengths are compared with the parent's); writes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_puzzle.environments.answer_formats import AnswerFormat, answer_format
from lit_puzzle.environments.completion import ParsedCompletion
from lit_puzzle.environments.environment import Environment
from lit_puzzle.environments.grading import Ungraded, grade_all
from lit_puzzle.environments.looping import looping_share
from lit_puzzle.rl.length_rewards import Looping, Overlong, budget, length_limit, parents_tokens
from lit_puzzle.rl.settings import ExtraReward, RewardFunction, RewardSettings
from lit_puzzle.rl.shared_rewards import GroupLength

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Weighted = tuple[RewardFunction, float]


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
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Return the verification of each completion; log the shares of `shares_of`, where TRL asks for metrics.

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
        if log_metric is not None:
            for name, share in shares_of([one.parsed for one in ungraded], completion_ids, self.form).items():
                log_metric(name, share)
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
class NoAnalysis:
    """-1.0 for a completion without thinking before the answer, at some efforts; 0.0 for all others."""

    tokenizer: "PreTrainedTokenizerBase"
    form: AnswerFormat
    efforts: tuple[str, ...]
    __name__ = "no_analysis"

    def __call__(self, *, completion_ids: list[list[int]], effort: list[str], **columns: Any) -> list[float]:
        """Return the reward of each completion."""
        rows = zip(decode(self.tokenizer, completion_ids), effort, strict=True)
        return [0.0 - (level in self.efforts and self.form.parse(text).analysis is None) for text, level in rows]


def shares_of(
    parsed: Sequence[ParsedCompletion], completion_ids: Sequence[Sequence[int]], form: AnswerFormat
) -> dict[str, float]:
    """Return shares: `unfinished`, `no_final`, `looping` and, where thinking stands apart, `no_analysis`.

    Args:
        parsed: at least one completion.
        completion_ids: its tokens.
        form: the format of completions.
    """
    shares = {
        "unfinished": sum(one.status == "unfinished" for one in parsed) / len(parsed),
        "no_final": sum(one.final is None for one in parsed) / len(parsed),
        "looping": looping_share(completion_ids),
    }
    return shares | ({"no_analysis": sum(one.analysis is None for one in parsed) / len(parsed)} if form.thinks else {})


def decode(tokenizer: "PreTrainedTokenizerBase", completion_ids: Sequence[Sequence[int]]) -> list[str]:
    """Return the texts of token lists, with special tokens."""
    return [str(tokenizer.decode(list(ids), skip_special_tokens=False)) for ids in completion_ids]


def build_rewards(
    settings: RewardSettings,
    extra: Sequence[ExtraReward],
    environments: Sequence[Environment],
    tokenizer: "PreTrainedTokenizerBase",
    lengths: Sequence[Weighted],
) -> tuple[list[RewardFunction], list[float]]:
    """Return the reward functions whose weight is not 0, and these weights, in the same order.

    Args:
        settings: weights and limits of the built-in rewards.
        extra: further rewards.
        environments: environments of the prompts.
        tokenizer: tokenizer of the policy.
        lengths: rewards of lengths and their weights (`length_rewards`).

    Raises:
        ValueError: missing thinking is penalized in a format that does not tell it apart.
    """
    form, endings = answer_format(tokenizer), settings.endings
    if endings.no_analysis > 0 and not form.thinks:
        raise ValueError(
            f"rewards.endings.no_analysis={endings.no_analysis} was given, but in completions of the format "
            f"{form.name} no thinking stands apart. Set it to 0."
        )
    weighted: list[Weighted] = [
        (Correctness(tuple(environments), tokenizer, form), settings.correctness),
        (Finished(tokenizer, form), settings.finished),
        (NoAnalysis(tokenizer, form, endings.no_analysis_efforts), endings.no_analysis),
        *lengths,
        *((reward.function, reward.weight) for reward in extra),
    ]
    used = [(function, weight) for function, weight in weighted if weight != 0]
    return [function for function, _ in used], [weight for _, weight in used]


def length_rewards(
    settings: RewardSettings, efforts: Sequence[str], parent: Path, max_new_tokens: int
) -> list[Weighted]:
    """Return the rewards of lengths with their weights.

    Args:
        settings: weights and limits.
        efforts: efforts of the prompts; the parent's length at each must be known if length is limited.
        parent: folder with the parent's lengths.
        max_new_tokens: cap on generated tokens.

    Raises:
        ValueError: length is limited and the folder does not give the parent's lengths at every effort, or `overlong`
            does not fit the cap.
    """
    settings.overlong.check_cap(max_new_tokens)
    limits: list[Weighted] = []
    if settings.length > 0 or settings.budget.weight > 0:
        tokens = parents_tokens(parent, efforts)
        limits.append((length_limit(settings.length_start, settings.length_end, tokens), settings.length))
        limits.append((budget(settings.budget, tokens), settings.budget.weight))
    return [
        *limits,
        (GroupLength(settings.group_length.right_only), settings.group_length.weight),
        (Overlong(max_new_tokens, settings.overlong.buffer_tokens), settings.overlong.weight),
        (Looping(), settings.endings.looping),
    ]
