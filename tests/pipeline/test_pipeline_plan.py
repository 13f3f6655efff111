"""`--plan` of a pipeline: every stage with what happens, its footprint and what it reads; nothing is started."""

import json
from pathlib import Path

import pytest

from lit_puzzle.cli import main


@pytest.mark.parametrize("name", ["pipeline", "pipeline_stock"])
def test_a_plan_lists_every_stage_and_starts_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["run", f"recipes/{name}.yaml", "--plan"])
    lines = capsys.readouterr().out.splitlines()
    (distill,) = [line for line in lines if line.startswith("distill ")]
    assert "runs" in distill and "MiB" in distill and "minutes" in distill and distill.endswith("assemble, generate")
    assert "serve_check: left out: .venv-vllm/bin/python is not there" in lines
    assert any(line.startswith("to run: ") for line in lines) and not (tmp_path / "runs").exists()


def test_documents_that_are_not_there_have_the_tokens_of_the_stage_that_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(
        "command: pipeline\nrun_dir: runs/p\nstages: [generate.yaml, precompute_logits.yaml]"
    )
    disk = {}
    for count in (1000, 2000):
        main(["run", "p.yaml", "--plan", "--json", f"--overrides.generate.prompts.num_prompts={count}"])
        rows = json.loads(capsys.readouterr().out)
        assert [row["stage"] for row in rows] == ["generate", "precompute_logits"] and rows[1]["state"] == "new"
        disk[count] = sum(rows[1]["disk_bytes"].values())
    assert 1.9 * disk[1000] < disk[2000] < 2.1 * disk[1000] < 1e9


def test_a_plan_refuses_what_the_run_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["run", "recipes/pipeline.yaml", "--plan", "--overrides.distill.model.init_args.chidl=x"])
    assert stopped.value.code == 2 and "stage 'distill'" in capsys.readouterr().err
