"""`lightning show`: everything about a run in one text, fast, without torch; wrong words and folders are one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.recorded_runs import answer, complete_run, weights

from lit_puzzle.environments.episodes import write_rows
from lit_puzzle.report.show import run_lines, show

SHOW = "import sys; from lit_puzzle.report.show import show; show(sys.argv[1:]); assert 'torch' not in sys.modules"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = complete_run(tmp_path / "run", {"child": weights("models/child", "b")}, "c", {"accuracy/low": 0.5})
    write_rows(folder / "episodes.parquet", [answer(row, "right" if row % 2 else "wrong") for row in range(2000)])
    return folder


def test_all_parts_are_printed_in_their_order(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show([str(run)])
    lines = capsys.readouterr().out.splitlines()
    starts = ["run: complete", "lineage", "made", "results", "answers in episodes.parquet: 2,000 rows"]
    places = [next(i for i, line in enumerate(lines) if start in line) for start in starts]
    assert places == sorted(places)
    assert sum(line.startswith("  wrong (grade 0)") for line in lines) == 3
    assert sum(line.startswith("  right (grade 1)") for line in lines) == 3
    assert lines == run_lines(run)


def test_it_needs_no_torch_and_less_than_a_second(run: Path) -> None:
    before = os.times()
    said = subprocess.run([sys.executable, "-c", SHOW, str(run)], capture_output=True, text=True, check=True).stdout
    after = os.times()
    assert "answers in episodes.parquet" in said
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


@pytest.mark.parametrize("size", [10, 20_000])
def test_a_closed_pipe_is_no_error(run: Path, size: int) -> None:
    write_rows(run / "episodes.parquet", [answer(row, completion="x" * size) for row in range(30)])
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", SHOW, str(run), "--full", "--samples=5"]
    with os.fdopen(writer, "wb") as closed:
        ended = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: run. usage: lightning show"),
        (["{run}", "--sample=2"], "unrecognized arguments: --sample=2"),
        (["{run}", "--samples=three"], "argument --samples: invalid int value: 'three'"),
        (["{run}", "--samples=-1"], "--samples=-1 was given; it must be at least 0"),
        (["{run}", "--rows=before"], "has no answers 'before'; it has episodes.parquet"),
        (["{run}/.."], "is not a run folder, but contains some: run"),
    ],
)
def test_wrong_words_are_one_line(run: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        show([word.format(run=run) for word in words])
    assert "\n" not in str(refused.value)


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read: .*too long"):
        show([str(tmp_path / ("x" * 5000))])
