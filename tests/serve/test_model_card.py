"""The model card: front matter for the hub, numbers of run.json, facts about the folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_puzzle.cli import main
from lit_puzzle.model.identity import weights_identity
from lit_puzzle.serve.export import export
from lit_puzzle.serve.model_card import numbers
from lit_puzzle.serve.settings import Card, Storage

ASSETS = Path(__file__).parents[2] / "lit_puzzle" / "assets"
CHILD, PARENT = ASSETS / "tiny_child", ASSETS / "tiny_parent"


def finished_run(
    folder: Path, command: str, results: dict[str, Any], made: Path | None = None, of: Path | None = None
) -> Path:
    """A complete run that has made a checkpoint, or is of one."""
    folder.mkdir()
    hardware = {"machine": "x86_64", "cpu_cores": 2, "gpus": []}
    record = {"command": command, "seed": 7, "seconds": 12.5, "git_commit": "abc123", "hardware": hardware}
    record["inputs"] = {} if of is None else {"checkpoint": weights_identity(of).to_json()}
    record["outputs"] = {} if made is None else {"child": weights_identity(made).to_json()}
    (folder / "run.json").write_text(json.dumps(record | {"results": results}))
    return folder


def card_of(run_dir: Path) -> tuple[dict[str, Any], str]:
    text = (run_dir / "model" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter_follows_the_hub(tmp_path: Path) -> None:
    export(tmp_path / "a", CHILD, card=Card("Small", "openai/gpt-oss-20b", "apache-2.0"))
    front, body = card_of(tmp_path / "a")
    assert front["license"] == "apache-2.0" and front["base_model"] == "openai/gpt-oss-20b"
    assert front["library_name"] == "transformers" and "gpt_oss_puzzle" in front["tags"]
    assert "# Small\n" in body and "parent, apache-2.0" in body and "trust_remote_code=True" in body
    export(tmp_path / "b", CHILD, storage=Storage(experts="mxfp4"))
    front, body = card_of(tmp_path / "b")
    assert "base_model" not in front and front["license"] == "unknown" and "mxfp4" in front["tags"]
    assert "No training run" in body and "No evaluation" in body
    assert "128 experts were rounded to MXFP4 by this export" in body


def test_the_table_lists_the_layers_of_the_child(tmp_path: Path) -> None:
    export(tmp_path, CHILD)
    _, body = card_of(tmp_path)
    rows = [line.split(" | ") for line in body.splitlines() if line.startswith("| ") and " of 16 " in line]
    assert [row[2] for row in rows] == ["16", "full attention", "16", "48", "16", "48"]
    assert [row[1] for row in rows] == [f"{kept} of 16" for kept in (16, 8, 8, 8, 12, 12)]
    assert {row[3] for row in rows} == {"floating point"}
    assert "![Experts and attention of every layer](plan.png)" in body
    picture = (tmp_path / "model" / "plan.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000
    assert "tokens 5, 6, 0 (generation_config.json)" in body


def test_numbers_of_run_json_appear(tmp_path: Path) -> None:
    before = {"accuracy": 0.5561, "accuracy/low": 0.4921875, "accuracy_se/low": 0.0313, "tokens/low": 5.734}
    after = {"accuracy": 0.625, "accuracy/low": 0.51953125, "accuracy_se/low": 0.0312, "accuracy/low/chains": 0.1111}
    gain = {"accuracy/high/gain": 0.1171875, "accuracy/high/gain_se": 0.0323, "reward/last": 0.75}
    card = Card(
        training=[finished_run(tmp_path / "rl", "lightning run recipes/rl_recover.yaml", gain, made=CHILD)],
        evaluations={
            "parent": finished_run(tmp_path / "parent", "lightning run recipes/evaluate.yaml --p", before, of=PARENT),
            "child": finished_run(tmp_path / "evaluated", "lightning run recipes/evaluate.yaml --c", after, of=CHILD),
        },
        remarks="Not tested on chess.",
    )
    export(tmp_path / "run", CHILD, card=card)
    front, body = card_of(tmp_path / "run")
    (index,) = front["model-index"]
    assert index["name"] == card.name
    (result,) = index["results"]  # of these weights only, for the hub
    assert result["dataset"]["name"] == "child, low effort" and result["task"]["type"] == "text-generation"
    assert result["metrics"] == [{"type": "accuracy", "name": "accuracy", "value": 0.51953125}]
    lines = body.splitlines()
    assert "| | parent | child |" in lines
    assert "| accuracy | 0.5561 | 0.625 |" in lines
    assert "| accuracy/low | 0.4922 ± 0.0313 | 0.5195 ± 0.0312 |" in lines
    assert "| tokens/low | 5.734 |  |" in lines
    assert "| accuracy/high/gain | 0.1172 ± 0.0323 |" in lines and "| reward/last | 0.75 |" in lines
    assert "chains" not in body and "_se" not in body
    assert "`lightning run recipes/evaluate.yaml --c` (seed 7, 12.5 s on 2 CPU cores, code abc123)" in body
    assert "- Not tested on chess." in lines
    assert "- child: of these weights, `lightning" in body
    assert "- parent: of other weights (tiny_parent, fingerprint " in body


def test_training_that_these_weights_never_had_is_refused(tmp_path: Path) -> None:
    """The child of another run, a run whose child these weights are, and one without a record."""
    other = finished_run(tmp_path / "other", "lightning run recipes/rl_recover.yaml", {}, made=PARENT)
    unknown = finished_run(tmp_path / "unknown", "lightning run recipes/rl_recover.yaml", {})
    own = finished_run(tmp_path / "own", "lightning run recipes/rl_recover.yaml", {}, made=CHILD)
    with pytest.raises(ValueError, match=r"card\.training names .*other, but .* did not come from this run: it made"):
        export(tmp_path / "run", CHILD, card=Card(training=[own, other]))
    with pytest.raises(ValueError, match=r"unknown, but .*: it has no record of what it made"):
        export(tmp_path / "run", CHILD, card=Card(training=[unknown]))
    assert not (tmp_path / "run").exists()
    export(tmp_path / "run", CHILD, card=Card(training=[own]))


def test_whole_numbers_and_missing_cells() -> None:
    table = numbers({"a": {"experts": 72, "ratio": 0.5}, "b": {"experts": 96.0}})
    assert table.splitlines()[2:] == ["| experts | 72 | 96 |", "| ratio | 0.5 |  |"]


def test_only_standard_errors_follow_other_numbers() -> None:
    table = numbers({"a": {"solver_seconds": 1.5, "tokens_seen": 4, "gain/low": 0.5, "gain_se/low": 0.25}})
    assert table.splitlines()[2:] == ["| solver_seconds | 1.5 |", "| tokens_seen | 4 |", "| gain/low | 0.5 ± 0.25 |"]


def test_results_that_are_text_are_copied() -> None:
    assert numbers({"a": {"report": "pass|fail"}}).splitlines()[2:] == [r"| report | pass\|fail |"]


def test_unfinished_runs_are_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "config.yaml").write_text("command: evaluate\n")
    with pytest.raises(ValueError, match="run folder that is not complete"):
        export(tmp_path / "run", CHILD, card=Card(evaluations={"child": tmp_path / "started"}))
    with pytest.raises(ValueError, match="does not exist"):
        export(tmp_path / "run", CHILD, card=Card(training=[tmp_path / "nowhere"]))
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(ValueError, match="has no results"):
        export(tmp_path / "run", CHILD, card=Card(training=[tmp_path / "empty.json"]))
    with pytest.raises(SystemExit):
        main(["run", "recipes/export.yaml", "--kv_scales=null", "--card.licens=mit", f"--run_dir={tmp_path / 'run'}"])
    assert "Did you mean 'license'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
