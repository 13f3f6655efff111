"""What a serving check found: named checks that passed, failed or were skipped for a reason, with their figures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from lit_puzzle.run.folder import write_atomically

Outcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Its key in report.json.
        outcome: Whether it passed.
        why: What was found, in a sentence.
        figures: What was measured.
    """

    name: str
    outcome: Outcome
    why: str
    figures: Mapping[str, float] = field(default_factory=dict)


def judged(name: str, passed: bool, why: str, **figures: float) -> Check:
    """A check that was made."""
    return Check(name, "passed" if passed else "failed", why, figures)


def skipped(name: str, why: str) -> Check:
    """A check that does not apply."""
    return Check(name, "skipped", why)


def write_report(path: Path, checks: Sequence[Check], versions: Mapping[str, str]) -> dict[str, float]:
    """Writes report.json, prints the table, and returns the flat numbers for run.json."""
    failed = [check.name for check in checks if check.outcome == "failed"]
    record = {"passed": not failed, "versions": dict(versions), "checks": [asdict(check) for check in checks]}
    write_atomically(path, json.dumps(record, indent=2) + "\n")
    table = Table("check", "outcome", "found", title="Serving")
    for check in checks:
        table.add_row(check.name, check.outcome, check.why)
    Console().print(table)
    counts = {
        outcome: float(sum(check.outcome == outcome for check in checks)) for outcome in ("passed", "failed", "skipped")
    }
    return counts | {f"{check.name}/{name}": value for check in checks for name, value in check.figures.items()}


def distance(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Largest and mean absolute difference of two tables of log-probabilities."""
    differences = [
        abs(a - b) for row, other_row in zip(one, other, strict=True) for a, b in zip(row, other_row, strict=True)
    ]
    return max(differences), sum(differences) / len(differences)
