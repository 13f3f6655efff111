"""Report of a serving check: named checks with outcome, reason and metrics. Writes report.json and prints a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from lit_puzzle.run.files import write_json

Outcome = Literal["passed", "failed", "skipped"]
OUTCOMES: tuple[Outcome, ...] = ("passed", "failed", "skipped")


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: name of the check in report.json.
        outcome: whether it passed.
        reason: what was found, in a sentence.
        metrics: measured numbers by name.
    """

    name: str
    outcome: Outcome
    reason: str
    metrics: Mapping[str, float] = field(default_factory=dict)


def checked(name: str, passed: bool, reason: str, metrics: Mapping[str, float]) -> Check:
    """Return a check that passed or failed."""
    return Check(name, "passed" if passed else "failed", reason, metrics)


def skipped(name: str, reason: str) -> Check:
    """Return a check that does not apply."""
    return Check(name, "skipped", reason)


def write_report(path: Path, checks: Sequence[Check], versions: Mapping[str, str]) -> dict[str, float]:
    """Write report.json and print a table.

    Args:
        path: the file to write.
        checks: all checks.
        versions: versions of the engine's packages.

    Returns:
        Number of checks by outcome, and `<check>/<metric>` of every check.
    """
    passed = all(check.outcome != "failed" for check in checks)
    record = {"passed": passed, "versions": dict(versions), "checks": [asdict(check) for check in checks]}
    write_json(path, record, indent=2)
    table = Table("check", "outcome", "found", title="Serving")
    for check in checks:
        table.add_row(check.name, check.outcome, check.reason)
    Console().print(table)
    counts = {outcome: float(sum(check.outcome == outcome for check in checks)) for outcome in OUTCOMES}
    return counts | {f"{check.name}/{name}": value for check in checks for name, value in check.metrics.items()}


def difference(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the largest and the mean absolute difference of two tables of log-probabilities."""
    differences = [
        abs(a - b) for row, other_row in zip(one, other, strict=True) for a, b in zip(row, other_row, strict=True)
    ]
    return max(differences), sum(differences) / len(differences)
