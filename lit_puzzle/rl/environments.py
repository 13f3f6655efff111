"""Environments: where prompts and verifiable rewards of reinforcement learning come from.

An environment draws a `Problem` (messages and the right answer, no effort yet) and verifies a completion (1.0 right,
0.0 wrong). Training and evaluation never meet: whether a problem is held out is decided by its text alone
(`is_held_out`), so every consumer, whatever its seed, agrees. Completions are harmony text decoded with special tokens:
``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>ANSWER<|return|>``.

Reads: JSON lines files (`JsonlEnvironment`). Writes: nothing.
Source: arXiv 2602.11937, RL recovery on math, coding and general reasoning with checkable answers.
"""

import json
import math
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EFFORTS = ("low", "medium", "high")
HELD_OUT_SHARE = 8  # one problem in eight is held out
MAX_DRAWS = 20_000  # draws without a new problem of the wanted split before an environment counts as exhausted

_RETURN = "<|return|>"
_FINAL = re.compile(r"<\|channel\|>\s*final\s*<\|message\|>")
_CONTROL = re.compile(r"<\|(start|end|message|channel|call|constrain)\|>")
_NUMBER = r"[+-]?(?:\d{1,100}(?:,\d{3})*(?:\.\d{0,100})?|\.\d{1,100})(?:[eE][+-]?\d{1,3})?(?:/\d{1,100})?"


@dataclass(frozen=True)
class Problem:
    """One question. `messages` are system / user texts without an effort; `answer` is what `verify` compares with."""

    environment: str
    messages: tuple[dict[str, str], ...]
    answer: str

    def text(self) -> str:
        """The messages as one string, the identity of the problem."""
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


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


def final_text(completion: str) -> str | None:
    """The text of the final channel, or None if the answer did not end by ``<|return|>`` inside a final channel."""
    body, ended, _ = completion.partition(_RETURN)
    answer = _FINAL.split(body)[-1]
    if not ended or answer == body or _CONTROL.search(answer):
        return None
    return answer


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


class JsonlEnvironment:
    r"""Problems from a file of JSON lines, each ``{"prompt": str | "messages": [...], "answer": str | number}``.

    Args:
        name: name under which metrics and rewards appear.
        path: the JSON lines file; read completely, and checked, at construction.
        verification: how the final channel is compared with the answer. ``exact``: equal text, white space apart.
            ``numeric``: equal numbers (``\boxed{}``, thousands commas, fractions, ``$`` and ``%`` signs understood;
            the last number counts). ``choice``: equal letter A-J.

    Raises:
        ValueError: missing or empty file, a line that is not such an object (named by number), or an answer that the
            verification cannot read.
    """

    def __init__(
        self, name: str, path: str | Path, verification: Literal["exact", "numeric", "choice"] = "exact"
    ) -> None:
        self.name = name
        self.verification = verification
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"Environment {name!r}: {file} is not a file. Give JSON lines of prompt and answer.")
        lines = file.read_text(encoding="utf-8").split("\n")
        self.problems = [self._parse(line, f"{file}:{index}") for index, line in enumerate(lines, 1) if line.strip()]
        if not self.problems:
            raise ValueError(f"Environment {name!r}: {file} holds no problem. Put one JSON object a line into it.")

    def problem(self, rng: random.Random) -> Problem:
        """One problem of the file."""
        return rng.choice(self.problems)

    def verify(self, completion: str, problem_answer: str) -> float:
        """1.0 if the final channel holds the answer, else 0.0."""
        final = final_text(completion)
        if final is None:
            return 0.0
        if self.verification == "exact":
            return float(final.split() == problem_answer.split())
        if self.verification == "choice":
            return float(parse_choice(final) == parse_choice(problem_answer))
        return float(same_number(parse_number(final), parse_number(problem_answer)))

    def _parse(self, line: str, where: str) -> Problem:
        """One line -> Problem; `where` (file:line) goes into every error."""
        form = '{"prompt": text, "answer": text} or {"messages": [{"role": ..., "content": ...}], "answer": text}'
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}). Each line is {form}.") from error
        if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row) or "answer" not in row:
            raise ValueError(f"{where}: {line[:80]!r} is not of the form {form}.")
        messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
            raise ValueError(f"{where}: messages must be objects of two texts, role and content. Each line is {form}.")
        if isinstance(row["answer"], bool) or not isinstance(row["answer"], str | int | float):
            raise ValueError(f"{where}: answer {row['answer']!r} must be a text or a number.")
        answer = str(row["answer"])
        if not self._readable(answer):
            raise ValueError(f"{where}: {answer!r} is no answer that {self.verification} verification can compare.")
        return Problem(self.name, tuple(messages), answer)

    def _readable(self, answer: str) -> bool:
        if self.verification == "numeric":
            return parse_number(answer) is not None
        return bool(answer.split() if self.verification == "exact" else parse_choice(answer))


def _is_message(message: object) -> bool:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        return False
    return all(isinstance(value, str) for value in message.values())


def _boxed(text: str) -> str:
    r"""What the last ``\boxed{...}`` holds (no nested braces), else the text itself."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return found[-1] if found else text


def parse_number(text: str) -> Fraction | None:
    r"""The last number in a text as an exact fraction, or None; reads ``\frac{1}{2}``, ``1/2``, ``0.50``, ``1,000``."""
    plain = re.sub(r"\\[dt]?frac\{([+-]?\d+)\}\{(\d+)\}", r"\1/\2", text)
    found = re.findall(_NUMBER, _boxed(plain))
    if not found:
        return None
    numerator, _, denominator = found[-1].replace(",", "").partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / int(denominator or 1)


def same_number(one: Fraction | None, other: Fraction | None) -> bool:
    """Equality; integers exactly, other numbers to a relative 1e-6 (so that rounded decimals of a fraction count)."""
    if one is None or other is None:
        return False
    return one == other or (other.denominator != 1 and abs(one - other) <= abs(other) / 1_000_000)


def parse_choice(text: str) -> str | None:
    """The chosen letter A-J: a leading one, else the one after "answer", else the only one named; None if unclear."""
    plain = _boxed(text).strip()
    leading = re.match(r"\(?([A-J])(?:[).:]|$)", plain)
    stated = re.findall(r"(?i:answer)\s*(?:(?i:is)|:)?\s*\(?([A-J])\b", plain)
    named = set(re.findall(r"\b([A-J])\b", plain))
    if leading:
        return str(leading[1])
    if stated:
        return str(stated[-1])
    return named.pop() if len(named) == 1 else None
