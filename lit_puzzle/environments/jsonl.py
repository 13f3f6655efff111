"""Reads problems from a file of JSON lines and checks them.

Reads: the file. Writes: nothing. Memory: the whole file.
"""

import json
import random
from pathlib import Path
from typing import Any, Literal

from lit_puzzle.environments.answers import final_text, parse_choice, parse_number, same_number
from lit_puzzle.environments.environment import Problem


class JsonlEnvironment:
    r"""Problems from a file of JSON lines, each ``{"prompt": str | "messages": [...], "answer": str | number}``.

    Args:
        name: under which problems, metrics and rewards appear.
        path: the file; it is read and checked completely at construction.
        verification: how the completion's final text is compared with the answer. ``exact``: equal text up to white
            space. ``numeric``: equal numbers (the last one counts; ``\boxed{}``, thousands commas, fractions, ``$``
            and ``%`` are understood). ``choice``: equal letter A-J.

    Raises:
        ValueError: the file is missing or empty, a line is not such an object (the message says which), or the
            verification cannot read an answer.
    """

    def __init__(
        self, name: str, path: str | Path, verification: Literal["exact", "numeric", "choice"] = "exact"
    ) -> None:
        self.name = name
        self.verification = verification
        file = Path(path)
        if not file.is_file():
            raise ValueError(
                f"Environment {name!r}: {file} is not a file. Give a file of JSON lines with prompt and answer."
            )
        lines = file.read_text(encoding="utf-8").split("\n")
        self.problems = [self._parse(line, f"{file}:{index}") for index, line in enumerate(lines, 1) if line.strip()]
        if not self.problems:
            raise ValueError(f"Environment {name!r}: {file} contains no problem. Write one JSON object per line.")

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem of the file."""
        return rng.choice(self.problems)

    def verify(self, completion: str, problem_answer: str) -> float:
        """Return 1.0 if the completion's final text is the answer, else 0.0."""
        final = final_text(completion)
        if final is None:
            return 0.0
        if self.verification == "exact":
            return float(final.split() == problem_answer.split())
        if self.verification == "choice":
            return float(parse_choice(final) == parse_choice(problem_answer))
        return float(same_number(parse_number(final), parse_number(problem_answer)))

    def _parse(self, line: str, where: str) -> Problem:
        """Return the problem of one line; `where` (file:line) goes into every error."""
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
            raise ValueError(f"{where}: {self.verification} verification cannot read the answer {answer!r}.")
        return Problem(self.name, tuple(messages), answer)

    def _readable(self, answer: str) -> bool:
        if self.verification == "numeric":
            return parse_number(answer) is not None
        return bool(answer.split() if self.verification == "exact" else parse_choice(answer))


def _is_message(message: object) -> bool:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        return False
    return all(isinstance(value, str) for value in message.values())
