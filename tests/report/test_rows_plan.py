"""The plan of `frontier` reads how many rows two evaluations have."""

from dataclasses import replace
from pathlib import Path

import pytest

from lit_puzzle.environments.episodes import EPISODES_FILE, Episode, Texts, write_rows
from lit_puzzle.environments.verdict import Verdict
from lit_puzzle.report.footprint import BYTES_OF_A_ROW, footprint
from lit_puzzle.run.footprint import Assumed, Device
from lit_puzzle.run.recipe_values import Values

CPU = Device("cpu", "cpu", 1, 8e9)


def planned(folder: Path) -> float:
    """Return the planned bytes of a folder's rows, read as parent and as child."""
    values = Values({"parent": str(folder), "child": str(folder)})
    return footprint(values, CPU, Assumed()).peak_bytes


def rows(count: int, characters: int) -> list[Episode]:
    """Return rows with texts that differ."""
    return [
        Episode("sums", "low", row, Verdict(1.0, "right"), 1, texts=Texts("", f"{row}".rjust(characters), ""))
        for row in range(count)
    ]


def test_plan_grows_with_rows_and_with_the_characters_that_files_state(tmp_path: Path) -> None:
    sizes = []
    for name, (count, characters) in {"few": (10, 10), "many": (1000, 10), "long": (1000, 10_000)}.items():
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / EPISODES_FILE, rows(count, characters))
        sizes.append(planned(tmp_path / name))
    few, many, long = sizes
    assert many - few > 2 * 990 * BYTES_OF_A_ROW
    assert long - many > 2 * 1000 * 9_000  # both files' texts


def test_plan_grows_with_prompts_not_with_samples_of_them(tmp_path: Path) -> None:
    for name, problems in (("prompts", 1000), ("samples", 10)):
        (tmp_path / name).mkdir()
        given = [replace(row, problem=row.problem % problems) for row in rows(1000, 10)]
        write_rows(tmp_path / name / EPISODES_FILE, given)
    assert planned(tmp_path / "prompts") > 24 * 1000 * 1000 > 4 * planned(tmp_path / "samples")


def test_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    (tmp_path / EPISODES_FILE).write_text("no table")
    with pytest.raises(ValueError, match=r"episodes\.parquet cannot be read as Parquet"):
        planned(tmp_path)
