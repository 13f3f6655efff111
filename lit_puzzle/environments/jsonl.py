"""Reads problems from files of rows in the project's own form and checks them.

Reads: JSON lines, plain or compressed by gzip, Parquet, or a folder of shards (`lit_puzzle.environments.row_files`).
Writes: nothing. Memory: all problems, and the unit tests of code.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_puzzle.environments.environment import Problem
from lit_puzzle.environments.graders.verifier import Verification, Verifier
from lit_puzzle.environments.messages import ROW, checked_messages, checked_row, checked_tools
from lit_puzzle.environments.row_files import read_rows
from lit_puzzle.environments.sandbox_limits import SandboxLimits
from lit_puzzle.environments.verdict import Verdict

FORM = f'{ROW}; and "answer": text, number or object'


class JsonlEnvironment:
    r"""Problems from a file of rows, each ``{"prompt": str | "messages": [...], "answer": ...}``.

    Args:
        name: under which problems, metrics and rewards appear.
        path: the file or folder; it is read and checked completely at construction.
        verification: how a completion's final text is compared with the answer: ``exact`` (equal text), ``numeric``
            (equal numbers), ``choice`` (equal letter), ``math`` (numbers, else math-verify), ``instructions`` (every
            instruction followed), ``schema`` (JSON that a schema allows) or ``code`` (every unit test passed).
        limits: of programs; only for ``code``.

    Raises:
        ValueError: the file is missing, empty or cannot be read, a row is not such an object (the message says which),
            the verification cannot read an answer, or a library or the sandbox that it needs is missing.
    """

    def __init__(
        self,
        name: str,
        path: str | Path,
        verification: Verification = "exact",
        limits: SandboxLimits | None = None,
    ) -> None:
        self.name = name
        self._verifier = Verifier(verification, limits)
        self.problems = [self._problem(row, place) for place, row in read_rows(Path(path))]
        if not self.problems:
            raise ValueError(f"Environment {name!r}: {path} contains no problem. Write one JSON object per line.")

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem of the file."""
        return rng.choice(self.problems)

    def verify(self, final: str, problem_answer: str) -> float:
        """Return the grade of one final text."""
        return self.verify_all([final], [problem_answer])[0].correct

    def verify_all(self, finals: Sequence[str], problem_answers: Sequence[str]) -> list[Verdict]:
        """Return the verdict on each final text."""
        return self._verifier.verdicts(finals, problem_answers)

    def _problem(self, value: Any, place: str) -> Problem:
        """Return the problem of one row; `place` (file:row) goes into every error."""
        row = checked_row(value, place, ["answer"], FORM)
        messages, tools = checked_messages(row, place), checked_tools(row, place)
        return Problem(self.name, messages, self._verifier.gold(row.get("answer"), place), tools, place)
