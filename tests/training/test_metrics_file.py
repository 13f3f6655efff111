"""metrics_file.py: rows, new columns, what a killed run leaves, and damaged files."""

from pathlib import Path

import pytest

from lit_puzzle.training.metrics_file import MetricsFile


def test_rows_come_back_with_every_bit_and_new_columns(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    rows = [(0, {"b": 0.1}), (1, {"b": 1 / 3, "a": 1e-30}), (1, {"c": 2.0}), (2, {"b": float("inf")})]
    for step, metrics in rows:
        file.append(step, metrics)
        assert list(file.rows())[-1] == (step, metrics)
    assert list(file.rows()) == rows
    assert file.path.read_text().splitlines()[:2] == ["step,a,b,c", "0,,0.1,"]


def test_a_resumed_run_cuts_rows_and_half_a_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    for step in range(5):
        file.append(step, {"loss": step / 2})
    with file.path.open("a") as stream:
        stream.write("5,2.")  # would read as a row
    resumed = MetricsFile(file.path)
    resumed.cut(3)
    resumed.append(3, {"loss": 1.5})
    assert list(resumed.rows()) == [(step, {"loss": step / 2}) for step in range(4)]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.0\none,2.0\n")
    with pytest.raises(ValueError, match=r"metrics\.csv, line 3, is damaged.*Remove the file"):
        MetricsFile(tmp_path / "metrics.csv").cut(1)
