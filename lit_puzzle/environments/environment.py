"""Environments: where prompts and verifiable rewards of reinforcement learning come from.

An environment draws a `Problem` (messages and the right answer, no effort yet) and verifies a completion (1.0 right,
0.0 wrong). Training and evaluation never meet: whether a problem is held out is decided by its text alone
(`is_held_out`), so every consumer, whatever its seed, agrees. How an answer is read from a completion is in
`lit_puzzle.environments.answers`.

Reads and writes nothing.
Source: arXiv 2602.11937, RL recovery on math, coding and general reasoning with checkable answers.
"""

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EFFORTS = ("low", "medium", "high")
HELD_OUT_SHARE = 8  # one problem in eight is held out
MAX_DRAWS = 20_000  # draws without a new problem of the wanted split before an environment counts as exhausted


@dataclass(frozen=True)
class Problem:
    """One question. `messages` are system / user texts without an effort; `answer` is what `verify` compares with."""

    environment: str
    messages: tuple[dict[str, str], ...]
    answer: str

    def text(self) -> str:
        """The messages as one string, the identity of the problem."""
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


PromptAtEffort = tuple[Problem, str]  # a problem and the reasoning effort at which it is put to a model


class Environment(Protocol):
    """What the rest of the project asks of an environment."""

    name: str

    def problem(self, rng: random.Random) -> Problem:
        """Draws one problem (of either split) from `rng`."""
        ...

    def verify(self, completion: str, problem_answer: str) -> float:
        """1.0 if the completion (text with special tokens) ends with the right answer, else 0.0."""
        ...


def render_prompt(tokenizer: "PreTrainedTokenizerBase", problem: Problem, effort: str) -> str:
    """The prompt's text by the tokenizer's chat template, up to where the assistant begins, at one effort."""
    messages = [dict(message) for message in problem.messages]
    return str(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, reasoning_effort=effort, tokenize=False)
    )


def is_held_out(problem: Problem) -> bool:
    """True for about one problem in eight, by content alone: crc32 of the messages' text."""
    return zlib.crc32(problem.text().encode()) % HELD_OUT_SHARE == 0


def effort_weights(efforts: Mapping[str, float] | Sequence[str]) -> dict[str, float]:
    """Checks an effort mix; a plain sequence of efforts weighs them equally.

    Raises:
        ValueError: no effort, an unknown effort, a negative weight, or weights that sum to zero.
    """
    weights = dict(efforts) if isinstance(efforts, Mapping) else dict.fromkeys(efforts, 1.0)
    unknown = [effort for effort in weights if effort not in EFFORTS]
    if unknown or not weights:
        raise ValueError(f"Efforts {list(weights)} were given; allowed are {list(EFFORTS)}. Name at least one of them.")
    if not all(0 <= weight < math.inf for weight in weights.values()) or sum(weights.values()) <= 0:
        raise ValueError(f"The effort mix {weights} needs finite weights >= 0 with a sum > 0, e.g. {{high: 1.0}}.")
    return weights


def draw(
    environments: Sequence[Environment],
    efforts: Mapping[str, float] | Sequence[str],
    count: int,
    seed: int,
    held_out: bool,
) -> list[tuple[Problem, str]]:
    """Draws `count` (problem, effort) pairs of one split; equal arguments give equal pairs.

    Environments take turns; efforts follow their weights. Problems do not depend on the efforts: drawing with ["low"]
    and with ["high"] gives the same problems. Held-out problems are all different (standard errors assume it);
    training problems repeat only after an environment has no new one to give.

    Raises:
        ValueError: no environments, duplicate names, a bad effort mix, or too few held-out problems.
    """
    weights = effort_weights(efforts)
    names = [environment.name for environment in environments]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"Environments {names} were given; at least one is needed and names must differ.")
    problem_rng, effort_rng = random.Random(f"problems {seed}"), random.Random(f"efforts {seed}")
    chosen = effort_rng.choices(list(weights), list(weights.values()), k=count)
    seen: dict[str, set[str]] = {name: set() for name in names}
    pairs = []
    for index in range(count):
        environment = environments[index % len(environments)]
        pairs.append((_draw_new(environment, problem_rng, held_out, seen[environment.name]), chosen[index]))
    return pairs


def _draw_new(environment: Environment, rng: random.Random, held_out: bool, seen: set[str]) -> Problem:
    """Draws a problem of the split that is not in `seen` and adds it there (training starts over when exhausted)."""
    repeated: Problem | None = None
    for _ in range(MAX_DRAWS):
        problem = environment.problem(rng)
        if is_held_out(problem) != held_out:
            continue
        if problem.text() not in seen:
            seen.add(problem.text())
            return problem
        repeated = problem
    if held_out or repeated is None:
        split = "held-out" if held_out else "training"
        raise ValueError(
            f"Environment {environment.name!r} gave {len(seen)} different {split} problems and no more in {MAX_DRAWS} "
            "draws (one problem in eight is held out). Ask for fewer prompts or give it more problems."
        )
    seen.clear()
    seen.add(repeated.text())
    return repeated
