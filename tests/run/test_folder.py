"""Run folders: inputs of stages, checkpoints that a kill cut short, atomic writing."""

from pathlib import Path

import pytest

from lit_puzzle.run import folder as runs
from lit_puzzle.run.open_run import open_run
from lit_puzzle.run.record import RunClock


def test_inputs_name_the_recipe_that_makes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"does not exist\. Make it with: lightning run recipes/importance\.yaml"):
        runs.require_input(Path("runs/importance"), "importance")
    open_run(Path("runs/importance"), "a: 1\n", overwrite=False)
    with pytest.raises(ValueError, match=r"not complete\. Make it with: lightning run recipes/importance\.yaml"):
        runs.require_input(Path("runs/importance/importance.json").parent, "importance")
    with pytest.raises(ValueError, match=r"does not exist yet: the run in 'runs/importance' is not complete\."):
        runs.require_input(Path("runs/importance/child"), "child")
    RunClock().close(Path("runs/importance"), Path("x.yaml"), None, resumed=False, results={})
    assert runs.require_input(Path("runs/importance"), "importance") == Path("runs/importance")


def test_packaged_assets_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.require_input(Path("lit_puzzle/assets/tiny_child"), "child").joinpath("config.json").is_file()
    with pytest.raises(ValueError, match="'lit_puzzle/assets/no_such' does not exist"):
        runs.require_input(Path("lit_puzzle/assets/no_such"), "child")


def test_an_output_is_named_by_its_run_its_folder_or_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "child/config.json",
        "child/plan.json",
        "before/episodes.parquet",
        "after/episodes.parquet",
        "scores.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    for given in (tmp_path, tmp_path / "child", tmp_path / "child" / "config.json"):
        assert runs.require_input(given, "child", "config.json") == tmp_path / "child"
        assert runs.require_file(given, "plan", "plan.json") in (tmp_path / "child" / "plan.json", given)
    for given in (tmp_path, tmp_path / "scores.json"):
        assert runs.require_input(given, "scores", "scores.json") == tmp_path
    assert runs.require_input(tmp_path, "parent", ("config.json", "top_logits.json")) == tmp_path / "child"
    with pytest.raises(ValueError, match=r"The baseline .* may be .*after, .*before; name one of them"):
        runs.require_input(tmp_path, "baseline", "episodes.parquet")
    with pytest.raises(ValueError, match=r"The adapter .* holds no adapter_config\.json\."):
        runs.require_input(tmp_path, "adapter", "adapter_config.json")
    (tmp_path / "runs" / "library").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"The library .* holds no library\.json\. Make it with: lightning run"):
        runs.require_input(Path("runs/library"), "library", "library.json")


def test_a_run_of_an_older_version_is_told_from_one_that_lacks_the_output(tmp_path: Path) -> None:
    """`config.yaml` is in every run folder, so it is no old form of `config.json`."""
    open_run(tmp_path / "old", "a: 1\n", overwrite=False)
    (tmp_path / "old" / "episodes.jsonl").write_text("")
    RunClock().close(tmp_path / "old", Path("x.yaml"), None, resumed=False, results={})
    with pytest.raises(ValueError, match=r"no episodes\.parquet, only episodes\.jsonl of an older version"):
        runs.require_input(tmp_path / "old", "baseline", "episodes.parquet")
    with pytest.raises(ValueError, match=r"holds no config\.json\.$"):
        runs.require_input(tmp_path / "old", "child", "config.json")
