"""The lineage as a tree: followed through runs wherever they lie, and marked where records do not agree."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.recorded_runs import complete_run, started_run, weights

from lit_puzzle.report.lineage_tree import lineage_lines, made_lines
from lit_puzzle.report.run_summary import read_run
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import record_output

ASSET = PACKAGE / "assets" / "tiny_parent"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Parent -> assemble -> distill -> rl, started with relative paths from one folder, which is returned."""
    monkeypatch.chdir(tmp_path)
    complete_run(Path("runs/assemble"), {"parent": weights(ASSET, "a")}, "b")
    complete_run(Path("runs/distill"), {"child": weights("runs/assemble/child", "b")}, "c")
    problems = Identity("environments sums", {"problems": "9" * 64})
    complete_run(Path("runs/rl"), {"child": weights("runs/distill/child", "c"), "data": problems}, "d")
    return tmp_path


def lines(run: Path, full: bool = False) -> list[str]:
    return lineage_lines(read_run(run), full)


def test_the_tree_leads_to_the_parent(runs: Path) -> None:
    commit = read_run(Path("runs/rl")).commit
    assert lines(Path("runs/rl")) == [
        "",
        "lineage",
        "  child: runs/distill/child  weights cccccccccccc",
        f"      made as child by runs/distill (fit, complete, {commit})",
        "        child: runs/assemble/child  weights bbbbbbbbbbbb",
        f"            made as child by runs/assemble (fit, complete, {commit})",
        f"              parent: {ASSET}  weights aaaaaaaaaaaa",
        "                  comes with lit_puzzle",
        "  data: environments sums  problems 999999999999",
    ]
    assert made_lines(read_run(Path("runs/rl")), False) == ["", "made", "  child: runs/rl/child  weights dddddddddddd"]


def test_all_digits_and_parts_with_full(runs: Path) -> None:
    assert f"runs/distill/child  weights {'c' * 64}  config {'0' * 64}" in lines(Path("runs/rl"), full=True)[2]


def test_runs_that_have_moved_together_are_followed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = lines(Path("runs/rl"))
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere" / "runs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert lines(Path("runs/rl")) == expected
    monkeypatch.chdir("/")
    assert sum("made as child by" in line for line in lines(tmp_path / "elsewhere" / "runs" / "rl")) == 2


def test_an_input_whose_run_was_repeated_disagrees_and_is_not_followed(runs: Path) -> None:
    shutil.rmtree("runs/distill")
    complete_run(Path("runs/distill"), {"child": weights("runs/assemble/child", "b")}, "e")
    said = lines(Path("runs/rl"))
    assert said[1] == "lineage (disagreements: 1)"
    assert "DISAGREES: runs/distill" in said[3] and "has recorded weights eeeeeeeeeeee here, as child" in said[3]
    assert said[4].startswith("  data:")


def test_a_disagreement_further_up_is_seen(runs: Path) -> None:
    shutil.rmtree("runs/assemble")
    complete_run(Path("runs/assemble"), {"parent": weights(ASSET, "a")}, "f")
    said = "\n".join(lines(Path("runs/rl")))
    assert "disagreements: 1" in said and "made as child by runs/distill" in said
    assert "DISAGREES: runs/assemble" in said


def test_what_no_run_has_recorded_or_is_not_there_is_said(runs: Path) -> None:
    started_run(Path("runs/open"), {})
    inputs = {"scores": Identity("runs/open/scores.json", {"files": "5" * 64}), "gone": weights("models/gone", "g")}
    said = "\n".join(lines(started_run(Path("runs/next"), inputs)))
    assert "lies in runs/open (fit, incomplete, commit unknown), which has not recorded its content" in said
    assert "gone: models/gone  weights gggggggggggg\n      not there any more, or moved" in said


def test_runs_that_name_each_other_end_and_own_files_lead_nowhere(runs: Path) -> None:
    started_run(Path("runs/a"), {"other": weights("runs/b/child", "b"), "own": weights("runs/a/tokens", "t")})
    record_output(Path("runs/a"), "child", Identity("runs/a/child", {"weights": "a" * 64}))
    started_run(Path("runs/b"), {"other": weights("runs/a/child", "a")})
    record_output(Path("runs/b"), "child", Identity("runs/b/child", {"weights": "b" * 64}))
    said = lines(Path("runs/a"))
    assert said[-2].endswith("; see above") and said[-1] == "  own: runs/a/tokens  weights tttttttttttt"
    assert len(said) == 7


def test_damage_in_another_run_is_said_in_its_place(runs: Path) -> None:
    Path("runs/assemble/inputs.json").write_text('{"format": 1, "date"')
    said = lines(Path("runs/rl"))
    assert any("its origin cannot be read: " in line and "assemble/inputs.json is not JSON" in line for line in said)
    assert said[-1].startswith("  data:")


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_paths_that_cannot_be_paths_are_said(runs: Path, path: str) -> None:
    said = lines(started_run(Path("runs/next"), {"child": weights(path, "a")}))
    assert len(said) == 4 and "its origin cannot be read" in said[3]


def test_a_config_of_something_else_is_no_run(runs: Path) -> None:
    Path("models/mine").mkdir(parents=True)
    Path("models/config.yaml").write_text("a: 1")
    said = lines(started_run(Path("runs/next"), {"child": weights("models/mine", "a")}))
    assert said == ["", "lineage", "  child: models/mine  weights aaaaaaaaaaaa"]


def test_no_recorded_inputs_are_said(runs: Path) -> None:
    assert lines(started_run(Path("runs/next"), {})) == ["", "lineage: no inputs recorded"]


def test_damage_in_the_own_record_is_an_error(runs: Path) -> None:
    record = json.loads(Path("runs/rl/inputs.json").read_text())
    Path("runs/rl/inputs.json").write_text(json.dumps(record | {"inputs": {"child": {"path": "x"}}}))
    with pytest.raises(ValueError, match=r"runs/rl/inputs.json is damaged"):
        lines(Path("runs/rl"))
