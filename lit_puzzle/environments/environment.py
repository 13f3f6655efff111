"""Environments: sources of problems whose answers can be verified, for reinforcement learning and evaluation.

An environment draws a `Problem` (messages and the right answer, no effort yet) and verifies a completion (1.0 right,
0.0 wrong) by its final text. Training and evaluation use different problems: whether a problem is held out follows from
its question alone (`is_held_out`), whatever the seed, the system prompt, white space or Unicode form. Prompts are
rendered by `lit_puzzle.environments.chat_template`; `lit_puzzle.environments.answer_formats` finds the final text of a
completion.

Reads and writes nothing.
Source: arXiv 2602.11937, RL recovery on math, coding and general reasoning with checkable answers.
"""

import json
import math
import random
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, overload, runtime_checkable

from lit_puzzle.environments.mixture import mixture_weights, turns

EFFORTS = ("low", "medium", "high")
NO_EFFORT = "none"  # of a model whose chat template has no levels of effort
LEVELS = (*EFFORTS, NO_EFFORT)
PLAIN_KEYS = ("role", "content")  # of a message
HELD_OUT_SHARE = 8  # one problem in eight is held out
MAX_DRAWS = 20_000  # draws without a new problem of the split after which an environment counts as exhausted
INVISIBLE = re.compile(  # Unicode's Default_Ignorable_Code_Point, and marks of annotations
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        environment: name of the environment that verifies it.
        messages: messages without an effort, up to the turn of the assistant: `role`, `content`, and further keys that
            the chat template takes (`thinking`, `tool_calls`).
        answer: the right answer, which `verify` compares with.
        tools: definitions of tools for the chat template.
        source: where it stands, `FILE:LINE`, for messages.
    """

    environment: str
    messages: tuple[dict[str, Any], ...]
    answer: str
    tools: tuple[dict[str, Any], ...] = ()
    source: str = field(default="", compare=False)

    def text(self) -> str:
        """Return the messages as one string, which identifies the problem."""
        lines = [f"{message['role']}: {message.get('content', '')}" for message in self.messages]
        further = [{key: part for key, part in message.items() if key not in PLAIN_KEYS} for message in self.messages]
        if any(further) or self.tools:
            lines.append(json.dumps([further, self.tools], sort_keys=True))
        return "\n".join(lines)

    def question(self) -> str:
        """Return the last user turn without regard to white space and Unicode form: what the problem asks.

        Words are joined by blanks, and the last word stands in a line of its own: so do the problems of the tiny world,
        whose parent was trained on the split that follows from this.
        """
        turns = [message["content"] for message in self.messages if message["role"] == "user"]
        text = INVISIBLE.sub("", unicodedata.normalize("NFKC", turns[-1] if turns else self.text()))
        text = unicodedata.normalize("NFKC", text)  # an invisible character keeps a letter and its accent apart
        head, _, last = " ".join(text.split()).rpartition(" ")
        return f"{head}\n{last}" if head else last

    def place(self) -> str:
        """Return where the problem stands, or its environment and the beginning of its question, for messages."""
        return self.source or f"{self.environment}: {self.question()[:60]!r}"


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

    def verify(self, final: str, problem_answer: str) -> float:
        """Return 1.0 if the final text of a completion is the right answer, else 0.0 (or a share).

        What has no final text, because it was truncated or calls a tool, is graded 0 before.
        """
        ...


@runtime_checkable
class Benchmark(Environment, Protocol):
    """An environment whose problems are all for measuring: every one is held out, none is a prompt of training.

    Attributes:
        is_benchmark: true; what makes an environment one.
        problems: all of its problems.
    """

    is_benchmark: bool
    problems: Sequence[Problem]


class Mixture(Sequence[Environment]):
    """Environments with weights: by how much more often than others each of them is drawn.

    Args:
        environments: sources of problems.
        weights: weight of each by its name.

    Raises:
        ValueError: an environment without a weight, a weight of none of them, or one that is not positive.
    """

    def __init__(self, environments: list[Environment], weights: dict[str, float]) -> None:
        self._environments = environments
        self._shares = mixture_weights([environment.name for environment in environments], weights)

    def shares(self) -> list[float]:
        """Return the weight of each environment, in their order."""
        return self._shares

    def __len__(self) -> int:
        return len(self._environments)

    @overload
    def __getitem__(self, index: int) -> Environment: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Environment]: ...

    def __getitem__(self, index: int | slice) -> Environment | Sequence[Environment]:
        return self._environments[index]


def is_held_out(problem: Problem) -> bool:
    """Return whether a problem is held out: true for about one in eight, by crc32 of its question alone."""
    return zlib.crc32(f"user: {problem.question()}".encode()) % HELD_OUT_SHARE == 0


def effort_weights(efforts: Mapping[str, float] | Sequence[str]) -> dict[str, float]:
    """Return the weight of each effort; a plain sequence of efforts weighs them equally.

    Raises:
        ValueError: there is no effort, an unknown one, one that is named twice or a negative weight, or the weights
            sum to zero.
    """
    if len(efforts) != len(set(efforts)):
        raise ValueError(f"Efforts {list(efforts)} were given; name each of them once.")
    weights = dict(efforts) if isinstance(efforts, Mapping) else dict.fromkeys(efforts, 1.0)
    unknown = [effort for effort in weights if effort not in LEVELS]
    if unknown or not weights:
        raise ValueError(
            f"Efforts {list(weights)} were given; allowed are {list(EFFORTS)}, or {NO_EFFORT!r} for a model without "
            "them. Name at least one."
        )
    if not all(0 <= weight < math.inf for weight in weights.values()) or sum(weights.values()) <= 0:
        raise ValueError(f"The effort mix {weights} needs finite weights >= 0 with a sum > 0, e.g. {{high: 1.0}}.")
    return weights


def draw(
    environments: Sequence[Environment],
    efforts: Mapping[str, float] | Sequence[str],
    count: int,
    seed: int,
    held_out: bool,
) -> list[PromptAtEffort]:
    """Draw (problem, effort) pairs of one split; equal arguments give equal pairs.

    Environments take turns (in a `Mixture` by their weights); efforts follow their weights. Problems do not depend on
    the efforts: drawing with ["low"] and with ["high"] gives the same problems. Held-out problems are all different
    (standard errors assume it); training problems repeat only after all of an environment's have been drawn.

    Args:
        environments: sources of problems, with different names; or a `Mixture` of them.
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
    orders = {each.name: _benchmark_order(each, seed, held_out) for each in environments if isinstance(each, Benchmark)}
    shares = environments.shares() if isinstance(environments, Mixture) else [1.0] * len(names)
    for index, turn in enumerate(turns(shares, count)):
        environment = environments[turn]
        if environment.name in orders:
            problem = _next_of(environment.name, orders[environment.name])
        else:
            problem = _draw_new(environment, problem_rng, held_out, seen[environment.name])
        pairs.append((problem, chosen[index]))
    return pairs


def _benchmark_order(benchmark: Benchmark, seed: int, held_out: bool) -> Iterator[Problem]:
    """Return the problems of a benchmark that differ in what they ask, in an order that follows from the seed."""
    if not held_out:
        raise ValueError(
            f"{benchmark.name} was given as a source of prompts for training; its problems are a benchmark, all "
            "of them for measuring. Take it out here, and name it in held_out.environments of an evaluation."
        )
    different = {problem.question(): problem for problem in benchmark.problems}
    order = list(different.values())
    random.Random(f"benchmark {seed}").shuffle(order)
    return iter(order)


def _next_of(name: str, order: Iterator[Problem]) -> Problem:
    problem = next(order, None)
    if problem is None:
        raise ValueError(f"{name} has fewer problems that differ than were asked for. Give a smaller number.")
    return problem


def _draw_new(environment: Environment, rng: random.Random, held_out: bool, seen: set[str]) -> Problem:
    """Draw a problem of the split that is not in `seen` and add it there (training starts over when exhausted)."""
    repeated: Problem | None = None
    for _ in range(MAX_DRAWS):
        problem = environment.problem(rng)
        if is_held_out(problem) != held_out:
            continue
        # Held-out problems differ in what they ask: standard errors assume it. Training problems may share a question.
        identity = problem.question() if held_out else problem.text()
        if identity not in seen:
            seen.add(identity)
            return problem
        repeated = problem
    if held_out or repeated is None:
        split = "held-out" if held_out else "training"
        raise ValueError(
            f"Environment {environment.name!r} gave {len(seen)} different {split} problems and no further one in "
            f"{MAX_DRAWS} draws (one problem in eight is held out, by its last user turn). Use fewer prompts or add "
            "problems to it."
        )
    seen.clear()
    seen.add(repeated.text())
    return repeated
