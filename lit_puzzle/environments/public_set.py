"""Problems of a public set in its own columns, from local files or from the Hugging Face hub.

The layouts: `lit_puzzle.environments.layouts`. Files: `lit_puzzle.environments.row_files`. Writes: nothing (the hub's
library keeps its cache). Memory: all problems as text, and the unit tests of code.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lit_puzzle.environments.environment import Problem
from lit_puzzle.environments.graders.verifier import Verifier
from lit_puzzle.environments.layouts import VERIFICATIONS, Layout, read_row
from lit_puzzle.environments.row_files import read_hub, read_rows
from lit_puzzle.environments.sandbox_limits import SandboxLimits
from lit_puzzle.environments.verdict import Verdict


class PublicSet:
    """Problems of a public set.

    Args:
        name: under which problems, metrics and rewards appear.
        layout: which columns it has, and with them how completions are verified.
        path: a local file, or a folder of shards; a copy of one split.
        hub: `owner/name` on the Hugging Face hub, in place of a path.
        config: its configuration, if it has several.
        split: its split.
        max_problems: the first so many rows; None: all.
        limits: of programs; only for code.

    Attributes:
        problems: those of the rows, each once.
        duplicates: rows left out because they repeat an earlier one (DAPO-Math-17k has each problem about a hundred
            times).

    Raises:
        ValueError: neither or both of path and hub, no rows, a row without the columns (the message names file, row and
            column), or for code no sandbox.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        path: str | Path | None = None,
        hub: str | None = None,
        config: str | None = None,
        split: str = "train",
        max_problems: int | None = None,
        limits: SandboxLimits | None = None,
    ) -> None:
        self.name = name
        if layout not in VERIFICATIONS:
            known = ", ".join(VERIFICATIONS)
            raise ValueError(f"Environment {name!r}: layout {layout!r} is not known; known are {known}.")
        if (path is None) == (hub is None):
            raise ValueError(f"Environment {name!r}: give either path (a file or folder) or hub (owner/name).")
        if max_problems is not None and max_problems < 1:
            raise ValueError(f"Environment {name!r}: max_problems is {max_problems}; at least 1 is needed.")
        self._verifier = Verifier(VERIFICATIONS[layout], limits)
        rows = read_rows(Path(path)) if path is not None else read_hub(str(hub), config, split)
        read = [self._problem(row, layout, place) for place, row in _first(rows, max_problems)]
        self.problems = list({(problem.text(), problem.answer): problem for problem in reversed(read)}.values())[::-1]
        self.duplicates = len(read) - len(self.problems)
        if not self.problems:
            raise ValueError(f"Environment {name!r}: {path or hub} contains no problem.")

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem of the set."""
        return rng.choice(self.problems)

    def verify(self, final: str, problem_answer: str) -> float:
        """Return the grade of one final text."""
        return self.verify_all([final], [problem_answer])[0].correct

    def verify_all(self, finals: Sequence[str], problem_answers: Sequence[str]) -> list[Verdict]:
        """Return the verdict on each final text."""
        return self._verifier.verdicts(finals, problem_answers)

    def _problem(self, row: Any, layout: Layout, place: str) -> Problem:
        messages, gold = read_row(row, layout, place)
        return Problem(self.name, messages, self._verifier.gold(gold, place), (), place)


def _first(rows: Iterator[tuple[str, Any]], count: int | None) -> Iterator[tuple[str, Any]]:
    return rows if count is None else islice(rows, count)
