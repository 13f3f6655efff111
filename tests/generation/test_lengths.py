"""The file of lengths: what is written is read, and anything but numbers is refused by file and key."""

import json
from pathlib import Path

import pytest

from lit_puzzle.generation.lengths import LENGTHS_FILE, LengthStatistics, read_lengths, write_lengths


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lengths = {"low": LengthStatistics(4.5, 4.0, 6.0), "high": LengthStatistics(31.25, 30.0, 40.0)}
    write_lengths(tmp_path, lengths)
    assert read_lengths(tmp_path) == lengths


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("many", "low.mean is 'many'"),
        (True, "low.mean is True"),
        (-1, "low.mean is -1"),
        (None, "low.mean is None"),
        ([3], "low.mean is "),
    ],
)
def test_what_is_no_length_is_named(tmp_path: Path, wrong: object, said: str) -> None:
    (tmp_path / LENGTHS_FILE).write_text(json.dumps({"low": {"mean": wrong, "p50": 4, "p95": 6.0}}))
    with pytest.raises(ValueError, match=rf"^[^\n]*{LENGTHS_FILE}: {said}[^\n]*$"):
        read_lengths(tmp_path)
