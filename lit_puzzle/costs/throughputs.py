"""The best token throughput of a parent and its child in one scenario, and the file that keeps it (`throughput.json`).

Imports no torch. Source: arXiv 2602.11937 (the best throughput over batch sizes counts).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lit_puzzle.run.files import read_json
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.strict_json import checked_fields

THROUGHPUT_FILE = "throughput.json"
Kind = Literal["measured", "predicted", "stated"]


@dataclass(frozen=True)
class Throughputs:
    """Best token throughput of both models.

    Attributes:
        parent: generated tokens per second of the parent.
        child: those of the child.
        kind: where the numbers come from.
        scenario: hardware, engine and lengths that they hold for.
        tried: batch size -> model -> generated tokens per second, of every batch size tried.

    Raises:
        ValueError: numbers that are not positive and finite, an unknown kind, or no scenario.
    """

    parent: float
    child: float
    kind: Kind
    scenario: str
    tried: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = (self.parent, self.child)
        if not all(isinstance(value, int | float) and 0 < value < math.inf for value in numbers):
            raise ValueError(
                f"throughput: parent {self.parent} and child {self.child} were given; both must be positive and finite."
            )
        if self.kind not in ("measured", "predicted", "stated"):
            raise ValueError(f"throughput: kind {self.kind!r} was given; it is measured, predicted or stated.")
        if not isinstance(self.scenario, str) or not self.scenario.strip():
            raise ValueError("throughput: scenario is empty: say the hardware, engine and lengths that it holds for.")


def read_throughputs(folder: Path) -> Throughputs:
    """Read the `throughput.json` of a run folder.

    Raises:
        ValueError: it is not there, or damaged.
    """
    file = require_input(folder, "run of throughput", THROUGHPUT_FILE) / THROUGHPUT_FILE
    try:
        return Throughputs(**checked_fields(Throughputs, read_json(file)))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
