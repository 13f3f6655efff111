"""Reads problems from a file of JSON lines and checks them.

Reads: the file, plain or compressed by gzip, UTF-8 or UTF-16 (`lit_puzzle.run.json_lines`). Writes: nothing. Memory:
the whole file.
"""

import random
from pathlib import Path
from typing import Any, Literal

from lit_puzzle.environments.answers import parse_choice, parse_number, same_number
from lit_puzzle.environments.environment import Problem
from lit_puzzle.environments.messages import ROW, checked_messages, checked_row, checked_tools
from lit_puzzle.run.json_lines import read_json_lines

FORM = f'{ROW}; and "answer": text or number'


class JsonlEnvironment:
    r"""Problems from a file of JSON lines, each ``{"prompt": str | "messages": [...], "answer": str | number}``.

    Args:
        name: under which problems, metrics and rewards appear.
        path: the file; it is read and checked completely at construction.
        verification: how the completion's final text is compared with the answer. ``exact``: equal text up to white
            space. ``numeric``: equal numbers (the last one counts; ``\boxed{}``, thousands commas, fractions, ``$``
            and ``%`` are understood). ``choice``: equal letter A-J.

    Raises:
        ValueError: the file is missing, empty or cannot be read, a line is not such an object (the message says which),
            or the verification cannot read an answer.
    """

    def __init__(
        self, name: str, path: str | Path, verification: Literal["exact", "numeric", "choice"] = "exact"
    ) -> None:
        self.name = name
        self.verification = verification
        self.problems = [self._problem(row, place) for place, row in read_json_lines(Path(path))]
        if not self.problems:
            raise ValueError(f"Environment {name!r}: {path} contains no problem. Write one JSON object per line.")

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem of the file."""
        return rng.choice(self.problems)

    def verify(self, final: str, problem_answer: str) -> float:
        """Return 1.0 if a completion's final text is the answer, else 0.0."""
        if self.verification == "exact":
            return float(final.split() == problem_answer.split())
        if self.verification == "choice":
            return float(parse_choice(final) == parse_choice(problem_answer))
        return float(same_number(parse_number(final), parse_number(problem_answer)))

    def _problem(self, value: Any, place: str) -> Problem:
        """Return the problem of one line; `place` (file:line) goes into every error."""
        row = checked_row(value, place, ["answer"], FORM)
        messages, tools, answer = checked_messages(row, place), checked_tools(row, place), row.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(f"{place}: answer {answer!r} must be a text or a number.")
        if not self._readable(str(answer)):
            raise ValueError(f"{place}: {self.verification} verification cannot read the answer {str(answer)[:80]!r}.")
        return Problem(self.name, messages, str(answer), tools, place)

    def _readable(self, answer: str) -> bool:
        if self.verification == "numeric":
            return parse_number(answer) is not None
        return bool(answer.split() if self.verification == "exact" else parse_choice(answer))
