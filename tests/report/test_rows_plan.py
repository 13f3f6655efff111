"""The plans of `frontier` and `report` read how many rows two evaluations have, and how much there is to draw."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.recorded_runs import started_run

from lit_puzzle.environments.episodes import EPISODES_FILE, Episode, Texts, write_rows
from lit_puzzle.environments.verdict import Verdict
from lit_puzzle.report.footprint import BYTES_OF_A_ROW, PICTURE_BYTES, footprint, report_footprint
from lit_puzzle.report.frontier import FRONTIER_FILE
from lit_puzzle.run.footprint import Assumed, Device, Footprint
from lit_puzzle.run.identity import file_identity
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


def reported(folder: Path) -> Footprint:
    """Return the plan of a report of a folder's runs."""
    return report_footprint(Values({"folders": [str(folder)]}), CPU, Assumed())


def test_report_plans_the_rows_that_its_frontier_compared(tmp_path: Path) -> None:
    for name, count in (("parent", 10_000), ("child", 10_000), ("other", 20_000)):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / EPISODES_FILE, rows(count, 10))
    assert reported(tmp_path).peak_bytes == PICTURE_BYTES
    compared = {name: file_identity(tmp_path / name, [EPISODES_FILE]) for name in ("parent", "child")}
    (started_run(tmp_path / "all" / "frontier", compared, "frontier") / FRONTIER_FILE).write_text("{}")
    plan = reported(tmp_path)
    held = sum(phase.parts["rows of both evaluations"] for phase in plan.phases if phase.name == "rows")
    assert 2 * 10_000 * BYTES_OF_A_ROW < held < 2.5 * 10_000 * BYTES_OF_A_ROW and not plan.notes
    (tmp_path / "all" / "frontier" / "inputs.json").write_text("damaged")  # as the page then says
    assert reported(tmp_path).peak_bytes == PICTURE_BYTES


def test_report_plans_the_numbers_that_it_draws_and_the_file_that_it_reads(tmp_path: Path) -> None:
    peaks = []
    for name, columns in {"drawn": ["train/reward"], "both": ["train/reward", "x", "y"], "none": ["x", "y"]}.items():
        (tmp_path / name / "run" / "logs").mkdir(parents=True)
        lines = [",".join([str(step), *["0.12345678901234567"] * len(columns)]) for step in range(10_000)]
        (tmp_path / name / "run" / "logs" / "metrics.csv").write_text("\n".join([",".join(["step", *columns]), *lines]))
        peaks.append({phase.name: phase.peak_bytes for phase in reported(tmp_path / name).phases})
    drawn, both, none = peaks
    assert both["drawing"] == pytest.approx(drawn["drawing"], rel=0.05) and none["drawing"] == PICTURE_BYTES
    assert both["reading curves"] - drawn["reading curves"] > 5 * 2 * 10_000 * 18


def test_report_of_a_folder_that_is_not_there_assumes_rows(tmp_path: Path) -> None:
    plan = reported(tmp_path / "absent")
    assert plan.peak_bytes > 2 * 100e6 and "10,000 rows of 100 MB are assumed" in plan.notes[0]
