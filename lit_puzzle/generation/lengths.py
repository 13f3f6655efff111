"""Lengths of completions: mean, quantiles, and the file `generation_lengths.json` that a parent hands to its children.

Reads and writes: `<checkpoint folder>/generation_lengths.json`, generated tokens per effort:
``{"high": {"mean": 32.1, "p50": 31.0, "p95": 40.0}, ...}``.
Source: the table of generated tokens per effort of arXiv 2602.11937. A quantile q is the smallest length that at least
a share q of the completions does not exceed (the inverse of the empirical distribution function).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lit_puzzle.run.files import read_json, write_json

LENGTHS_FILE = "generation_lengths.json"
FORM = 'Its form is {"high": {"mean": 1.0, "p50": 1.0, "p95": 1.0}}.'


@dataclass(frozen=True)
class LengthStatistics:
    """Generated tokens of one group of completions."""

    mean: float
    p50: float
    p95: float


def length_statistics(lengths: Sequence[int]) -> LengthStatistics:
    """Mean, median and 95th percentile of at least one length."""
    ordered = sorted(lengths)

    def quantile(share: float) -> float:
        return float(ordered[max(math.ceil(share * len(ordered)) - 1, 0)])

    return LengthStatistics(sum(ordered) / len(ordered), quantile(0.5), quantile(0.95))


def write_lengths(folder: Path, lengths: dict[str, LengthStatistics]) -> None:
    """Write `generation_lengths.json` into a folder."""
    record = {effort: asdict(statistics) for effort, statistics in lengths.items()}
    write_json(folder / LENGTHS_FILE, record, indent=2)


def read_lengths(folder: Path) -> dict[str, LengthStatistics]:
    """Read the lengths that a checkpoint folder carries.

    Raises:
        ValueError: no such file in the folder, or a file of another form.
    """
    file = folder / LENGTHS_FILE
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist: nothing says how long the parent's completions are. "
            "`lightning run recipes/evaluate.yaml --checkpoint=PARENT` writes it into its run folder; copy it here."
        )
    try:
        lengths = {effort: LengthStatistics(**values) for effort, values in read_json(file).items()}
    except TypeError as error:
        raise ValueError(f"{file}: {error}. {FORM}") from error
    for effort, statistics in lengths.items():
        for key, value in asdict(statistics).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ValueError(f"{file}: {effort}.{key} is {value!r}; a length is a number of tokens. {FORM}")
    return lengths


def known_lengths(folder: Path) -> dict[str, LengthStatistics]:
    """Read the lengths that a checkpoint folder carries; empty if it carries none.

    Raises:
        ValueError: a file of another form.
    """
    return read_lengths(folder) if (folder / LENGTHS_FILE).is_file() else {}
