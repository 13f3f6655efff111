"""ablations.py: variants and seeds from names, means and errors by hand, other problems refused; the script's table."""

import runpy
import sys
from pathlib import Path

import pytest
from helpers.recorded_runs import complete_run, started_run

from lit_puzzle.report.ablations import ablation_table, ablations_section, grids
from lit_puzzle.report.found_runs import find_runs
from lit_puzzle.run.identity import Identity

SEEDS = {"searched": [0.5, 0.75], "greedy-of-all": [0.25, 0.25]}
SCRIPT = Path(__file__).parents[2] / "scripts" / "ablations" / "table.py"


def evaluation(folder: Path, accuracy: float, problems: str = "a") -> None:
    asked = {"held_out": Identity("environments chains", {"problems": problems})}
    results = {"accuracy": accuracy}
    for effort, change in (("low", -0.25), ("high", 0.25)):
        results |= {f"accuracy/{effort}": accuracy + change, f"tokens/{effort}": 10 + change}
    complete_run(folder, asked, "x", results)
    (folder / "config.yaml").write_text(f"command: evaluate\nrun_dir: {folder}\n")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for variant, values in SEEDS.items():
        for seed, accuracy in enumerate(values):
            evaluation(tmp_path / "runs" / f"evaluate-{variant}-{seed}", accuracy)
    evaluation(tmp_path / "runs" / "evaluate_parent", 0.9)
    started_run(tmp_path / "runs" / "evaluate-searched-2", {}, "evaluate")
    started_run(tmp_path / "runs" / "search-searched-2", {}, "search")
    return tmp_path / "runs"


def test_means_and_errors_are_those_by_hand(runs: Path) -> None:
    (grid,) = grids(find_runs([runs], runs / "report"))
    table = ablation_table(grid)
    assert table.head == ["variant", "seeds", "low", "high", "mean", "each seed", "tokens"]
    assert table.rows == [  # s of (.5, .75) is .1768, over the root of 2 it is .125
        ["searched", "2", "0.375 ± 0.125", "0.875 ± 0.125", "0.625 ± 0.125", "0.500, 0.750", "9.8 / 10.2"],
        ["greedy-of-all", "2", "0.000 ± 0.000", "0.500 ± 0.000", "0.250 ± 0.000", "0.250, 0.250", "9.8 / 10.2"],
    ]


def test_the_section_names_what_is_missing(runs: Path) -> None:
    section = ablations_section(find_runs([runs], runs / "report"))
    assert f"Not finished in {runs}: evaluate-searched-2." in section.text and len(section.sources) == 4
    alone = find_runs([runs / "evaluate_parent", runs / "evaluate-searched-0"], runs / "report")
    assert "lightning run recipes/ablations.yaml" in str(ablations_section(alone).missing)


def test_evaluations_of_other_problems_are_not_compared(runs: Path) -> None:
    evaluation(runs / "evaluate-greedy-of-all-2", 0.5, problems="b")
    (grid,) = grids(find_runs([runs], runs / "report"))
    with pytest.raises(ValueError, match=r"evaluate-greedy-of-all-2 .* have other problems"):
        ablation_table(grid)


def test_each_stage_is_a_grid_and_one_without_a_table_takes_no_other_away(runs: Path) -> None:
    for variant, values in SEEDS.items():
        for seed, accuracy in enumerate(values):
            evaluation(runs / f"before-{variant}-{seed}", accuracy - 0.25)
    for date, problems in (("math-2026-11-26", "a"), ("code-2026-11-27", "b")):
        evaluation(runs / f"eval-{date}", 0.5, problems)
    section = ablations_section(find_runs([runs], runs / "report"))
    assert [table.rows[0][4] for table in section.tables] == ["0.375 ± 0.125", "0.625 ± 0.125"]
    assert f"From top to bottom: {runs / 'before'}, {runs / 'evaluate'}." in section.text
    assert any(
        line.startswith(f"No table of {runs / 'eval'}: ") and "have other problems" in line for line in section.text
    )
    alone = find_runs(sorted(runs.glob("eval-*")), runs / "report")
    assert str(ablations_section(alone).missing).startswith(f"No table of {runs / 'eval'}: ")


def test_one_seed_has_no_error(runs: Path) -> None:
    evaluation(runs / "evaluate-one-0", 0.375)
    (grid,) = grids(find_runs([runs], runs / "report"))
    assert ["one", "1", "0.125", "0.625", "0.375", "0.375", "9.8 / 10.2"] in list(ablation_table(grid).rows)


def test_the_script_prints_the_table(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["table.py", str(runs)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| variant | seeds | low | high | mean | each seed | tokens |" and len(lines) == 5
    assert lines[2].startswith("| searched | 2 | 0.375 ± 0.125 |") and lines[4] == "Not finished: evaluate-searched-2."
