"""What a run folder says about its run, and what is no run folder."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.recorded_runs import complete_run, started_run

from lit_puzzle.report.run_summary import change_lines, head_lines, read_run, result_lines
from lit_puzzle.run.inputs import record_changes
from lit_puzzle.run.lock import locked


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_complete_run_shows_recipe_command_commit_time_and_hardware(tmp_path: Path) -> None:
    run = complete_run(tmp_path / "run", {}, "a")
    hardware = {"machine": "x86_64", "cpu_cores": 16, "gpus": ["H100", "H100"]}
    values = {"command": "lightning run recipes/some.yaml --a=1", "git_commit": "0123456789abcdef+changes"}
    peak = {"cpu": 1.25, "gpu0": 70.5}
    changed(run / "run.json", **values, seconds=12.5, hardware=hardware, peak_memory_gib=peak)
    date = json.loads((run / "inputs.json").read_text())["date"]
    assert head_lines(read_run(run)) == [
        f"{run}: complete",
        "  recipe   recipes/some.yaml",
        "  command  lightning run recipes/some.yaml --a=1",
        "  commit 0123456789ab+changes, 12.5 s, 1.25 GiB (cpu), 70.5 GiB (gpu0), x86_64 with 16 cores, 2 x H100, "
        f"seed 7, date {date}",
    ]
    changed(run / "run.json", resumed=True, git_commit=None)
    assert head_lines(read_run(run))[0] == f"{run}: complete, after a resumption"
    assert "commit unknown" in head_lines(read_run(run))[3]


def test_an_incomplete_run_says_what_completes_it_and_who_is_at_work(tmp_path: Path) -> None:
    run = started_run(tmp_path / "run", {}, "generate")
    assert head_lines(read_run(run))[:2] == [
        f"{run}: incomplete; the command that started it resumes it",
        "  stage    generate",
    ]
    assert result_lines(read_run(run)) == ["", "results: none yet"]
    (run / "checkpoints").mkdir()
    for step in (9, 10):
        (run / "checkpoints" / f"step={step}.ckpt").touch()
        os.utime(run / "checkpoints" / f"step={step}.ckpt", (step, step))
    assert head_lines(read_run(run))[2] == "  reached  checkpoints/step=10.ckpt"
    with locked(run):
        assert read_run(run).state.startswith("incomplete; at work: process ")
    (run / ".lit_puzzle_lock").write_text("{}")
    assert read_run(run).state == "incomplete; the command that started it resumes it"


def test_a_folder_with_nothing_but_the_marker_is_an_incomplete_run(tmp_path: Path) -> None:
    (tmp_path / ".lit_puzzle_run").write_text("{}")
    assert head_lines(read_run(tmp_path))[1] == "  stage    unknown command"


def test_changes_on_resume_and_results_are_shown(tmp_path: Path) -> None:
    run = complete_run(tmp_path / "run", {}, "a", {"loss": 0.5, "accuracy/low": 0.25, "accuracy_se/low": 0.125})
    assert change_lines(read_run(run)) == []
    record_changes(run, [{"key": "trainer.max_steps", "before": 2, "now": 4}])
    assert change_lines(read_run(run)) == ["", "changes on resume", "  trainer.max_steps: 2 -> 4"]
    assert result_lines(read_run(run)) == ["", "results", "  loss 0.5", "        accuracy", "  low   0.25 ± 0.125"]


def test_what_is_no_run_folder_says_so(tmp_path: Path) -> None:
    run = complete_run(tmp_path / "run", {}, "a")
    (run / "child").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("a: 1")
    for folder, message in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "other", r"is not a run folder: it has neither \.lit_puzzle_run nor inputs\.json, nor"),
        (run / "child", f"lies in one: lightning show {run}"),
        (run / "run.json", f"lies in one: lightning show {run}"),
        (tmp_path, "contains some: run. Name one"),
    ):
        with pytest.raises(ValueError, match=message):
            read_run(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", '{"recipe": "x"', "run.json is not JSON"),
        ("run.json", "[]", "run.json must hold a JSON object"),
        ("run.json", '{"results": [1]}', r"run.json is damaged: results is '\[1\]', no dict"),
        ("run.json", '{"hardware": {"gpus": 3}}', "run.json is damaged: hardware.gpus is '3', no list"),
        ("config.yaml", "a: [", "config.yaml is not valid YAML"),
        ("config.yaml", "- a", "config.yaml is damaged: it holds"),
        ("inputs.json", '{"format": 1, "changes": {}}', "inputs.json is damaged: changes is"),
        ("inputs.json", '{"format": 1, "changes": ["a"]}', "inputs.json is damaged: changes.0 is"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    run = complete_run(tmp_path / "run", {}, "a")
    (run / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(run)
