"""The stage on real rows: a child that equals its parent, numbers in the file, refusals."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lit_puzzle.costs.throughputs import THROUGHPUT_FILE
from lit_puzzle.environments.episodes import EPISODES_FILE, Episode, write_rows
from lit_puzzle.environments.verdict import Verdict
from lit_puzzle.report.frontier import frontier
from lit_puzzle.run.files import write_json


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    rows = [
        Episode(task, effort, problem, Verdict(float(problem % 3 > 0), "", looping=problem == 7), tokens + problem)
        for task in ("a", "b")
        for effort, tokens in (("low", 5), ("high", 50))
        for problem in range(20)
    ]
    child = [replace(row, generated_tokens=2 * row.generated_tokens) for row in rows]
    found = {name: tmp_path / name for name in ("parent", "child", "throughput", "run")}
    for folder in found.values():
        folder.mkdir()
    write_rows(found["parent"] / EPISODES_FILE, rows)
    write_rows(found["child"] / EPISODES_FILE, child)
    content = {"parent": 10.0, "child": 30.0, "kind": "stated", "scenario": "a machine", "tried": {}}
    write_json(found["throughput"] / THROUGHPUT_FILE, content)
    return found


def judged(runs: dict[str, Path], **settings: object) -> dict[str, float]:
    return frontier(runs["run"], runs["parent"], runs["child"], runs["throughput"], resamples=100, **settings)  # type: ignore[arg-type]


def test_twice_the_tokens_at_three_times_the_speed(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    results = judged(runs)
    assert results["request_rate/high/parent"] == 1
    for effort in ("low", "high"):
        assert results[f"request_rate/{effort}/ratio"] == pytest.approx(1.5)
        assert results[f"request_rate/{effort}/ratio_low"] == pytest.approx(1.5)
        assert results[f"speed_up/{effort}"] == pytest.approx(1.5 if effort == "low" else results["speed_up/high"])
        assert results[f"loops/{effort}/parent"] == results[f"loops/{effort}/child"] == 0.05
        assert results[f"loops/{effort}/detectable"] == 3 / 40
    content = json.loads((runs["run"] / "frontier.json").read_text())
    assert content["verdict"] == "The child's frontier lies on or above the parent's at every request rate."
    assert content["throughput"]["kind"] == "stated" and content["settings"]["child"]["low"]["accuracy"]["a"] == 0.65
    assert "a machine" in capsys.readouterr().out


def test_refusals(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resamples 10 was given"):
        frontier(runs["run"], runs["parent"], runs["child"], runs["throughput"], resamples=10)
    with pytest.raises(ValueError, match="reference_effort 'medium'"):
        judged(runs, reference_effort="medium")
    (runs["child"] / EPISODES_FILE).write_text("")
    with pytest.raises(ValueError, match="80 requests of the parent and 0 of the child"):
        judged(runs | {"run": tmp_path / "other"})
    (runs["throughput"] / THROUGHPUT_FILE).write_text(
        '{"parent": 0, "child": 1, "kind": "stated", "scenario": "x", "tried": {}}'
    )
    with pytest.raises(ValueError, match=r"throughput\.json: throughput: parent 0 and child 1 were given"):
        judged(runs)


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("sampling", "{max_new_tokens: 96}", "{max_new_tokens: 48}"),
        ("held_out.answer_format", "whole", "harmony"),
        ("held_out.samples_per_prompt", "1", "4"),
    ],
)
def test_other_settings_are_refused(runs: dict[str, Path], key: str, old: str, new: str) -> None:
    top, _, inner = key.partition(".")
    for name, value in (("parent", old), ("child", new)):
        write_json(runs[name] / "inputs.json", {"format": 1, "date": "2026-01-01", "inputs": {}})
        write_json(runs[name] / "run.json", {})
        setting = f"{top}: {{{inner}: {value}}}" if inner else f"{top}: {value}"
        (runs[name] / "config.yaml").write_text(f"command: evaluate\n{setting}\n")
    shown = [text.strip("{}").split(": ")[-1] for text in (old, new)]
    with pytest.raises(ValueError, match=rf"{key} of parent is .*{shown[0]}.*, of child .*{shown[1]}"):
        judged(runs)


def test_other_problems_are_refused_with_the_setting_that_differs_or_without_one(runs: dict[str, Path]) -> None:
    for name, other in (("parent", "a"), ("child", "b")):
        inputs = {"held_out": {"path": "problems", "content": {"problems": other}}}
        write_json(runs[name] / "inputs.json", {"format": 1, "date": "2026-01-01", "inputs": inputs})
        write_json(runs[name] / "run.json", {})
        (runs[name] / "config.yaml").write_text(f"command: evaluate\nheld_out: {{seed: {len(name)}}}\n")
    with pytest.raises(ValueError, match=r"held_out\.seed of parent is 6, of child 5: the two"):
        judged(runs)
    (runs["child"] / "config.yaml").write_text("command: evaluate\nheld_out: {seed: 6}\n")
    with pytest.raises(
        ValueError, match=r"child have other problems, right answers or graders: the two cannot be compared\."
    ):
        judged(runs)


def record(folder: Path, **configs: str) -> None:
    """Make a folder a complete run that read checkpoints with these hashes of their config.json."""
    inputs = {name: {"path": name, "content": {"config": config}} for name, config in configs.items()}
    write_json(folder / "inputs.json", {"format": 1, "date": "2026-01-01", "inputs": inputs})
    write_json(folder / "run.json", {})
    (folder / "config.yaml").write_text("command: evaluate\n")


def test_exchanged_models_are_refused_and_other_folders_noted(runs: dict[str, Path], tmp_path: Path) -> None:
    record(runs["parent"], checkpoint="p")
    record(runs["child"], checkpoint="c")
    record(runs["throughput"], parent="c", child="p")
    with pytest.raises(ValueError, match="parent and child are exchanged"):
        judged(runs)
    record(runs["throughput"], parent="p", child="exported")
    (tmp_path / "second").mkdir()
    judged(runs | {"run": tmp_path / "second"})
    content = json.loads((tmp_path / "second" / "frontier.json").read_text())
    assert content["notes"] == ["evaluated was checkpoint, timed child, whose config.json differs"]


def test_it_needs_no_torch() -> None:
    code = "import sys, lit_puzzle.report.frontier; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
