"""Environments: sources of problems whose answers can be verified, for reinforcement learning and evaluation.

An environment draws a `Problem` (messages and the right answer, no effort yet) and verifies a completion (1.0 right,
0.0 wrong). Training and evaluation use different problems: whether a problem is held out follows from its text alone
(`is_held_out`), whatever the seed. Reading the answer of a completion: `lit_puzzle.environments.answers`.

Reads and writes nothing.
Source: arXiv 2602.11937, RL recovery on math, coding and general reasoning with checkable answers.
"""

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lit_puzzle.model.chat import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EFFORTS = ("low", "medium", "high")
HELD_OUT_SHARE = 8  # one problem in eight is held out
MAX_DRAWS = 20_000  # draws without a new problem of the split after which an environment counts as exhausted


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        environment: name of the environment that verifies it.
        messages: system and user messages (`role`, `content`) without an effort.
        answer: the right answer, which `verify` compares with.
    """

    environment: str
    messages: tuple[dict[str, str], ...]
    answer: str

    def text(self) -> str:
        """Return the messages as one string, which identifies the problem."""
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


PromptAtEffort = tuple[Problem, str]  # a problem and the reasoning effort at which it is put to a model


class Environment(Protocol):
    """The interface of an environment.

    Attributes:
        name: under which its problems and metrics appear.
    """

    name: str

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem (of either split) from `rng`."""
        ...

    def verify(self, completion: str, problem_answer: str) -> float:
        """Return 1.0 if the completion (text with special tokens) ends with the right answer, else 0.0."""
        ...


def render_prompt(tokenizer: "PreTrainedTokenizerBase", problem: Problem, effort: str) -> str:
    """Return the text of a prompt by the tokenizer's chat template, up to where the assistant's turn begins.

    Args:
        tokenizer: of the model; its chat template takes `reasoning_effort`.
        problem: whose messages are rendered.
        effort: low, medium or high.
    """
    return render_chat(tokenizer, problem.messages, reasoning_effort=effort)


def is_held_out(problem: Problem) -> bool:
    """Return whether a problem is held out: true for about one in eight, by crc32 of the messages' text alone."""
    return zlib.crc32(problem.text().encode()) % HELD_OUT_SHARE == 0


def effort_weights(efforts: Mapping[str, float] | Sequence[str]) -> dict[str, float]:
    """Return the weight of each effort; a plain sequence of efforts weighs them equally.

    Raises:
        ValueError: there is no effort, an unknown one or a negative weight, or the weights sum to zero.
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
    """Draw (problem, effort) pairs of one split; equal arguments give equal pairs.

    Environments take turns; efforts follow their weights. Problems do not depend on the efforts: drawing with ["low"]
    and with ["high"] gives the same problems. Held-out problems are all different (standard errors assume it);
    training problems repeat only after all of an environment's have been drawn.

    Args:
        environments: sources of problems, with different names.
        efforts: weights of the efforts, or efforts of equal weight.
        count: number of pairs.
        seed: of problems and efforts.
        held_out: which split.

    Raises:
        ValueError: there is no environment, names occur twice, the effort mix is wrong, or there are too few held-out
            problems.
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
    """Draw a problem of the split that is not in `seen` and add it there (training starts over when exhausted)."""
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
            f"Environment {environment.name!r} gave {len(seen)} different {split} problems and no further one in "
            f"{MAX_DRAWS} draws (one problem in eight is held out). Use fewer prompts or add problems to it."
        )
    seen.clear()
    seen.add(repeated.text())
    return repeated
