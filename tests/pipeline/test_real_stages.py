"""A pipeline of real stages of the tiny parent: killed in one, resumed, and compared with the stages run alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_puzzle.run.files import read_json

STAGES: list[dict[str, Any]] = [
    {"recipe": "recipes/final_kl.yaml", "overrides": {"data.init_args.prompts.num_prompts": 6}},
    {"recipe": "recipes/library.yaml", "overrides": {"experts": [8], "windows": []}},
    {
        "recipe": "recipes/assemble.yaml",
        "overrides": {"plan": None, "manual.importance": "runs/final_kl", "manual.experts": 8},
    },
]
REPORT: dict[str, Any] = {
    "recipe": "recipes/report.yaml",
    "overrides": {"folders": ["runs/final_kl", "runs/library", "runs/assemble"]},
}


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lit_puzzle", "run", *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    return out


def weights(folder: Path) -> bytes:
    return (folder / "child" / "model.safetensors").read_bytes()


def check_report(pipeline: Path) -> None:
    """The report, the last stage, draws the stages of the pipeline that it ran in, and names what was not run."""
    page = (pipeline / "report" / "report.html").read_text()
    for stage in STAGES:
        folder = f"runs/all/{Path(stage['recipe']).stem}"
        assert f"<td>{folder}</td>" in page, folder
    results = read_json(pipeline / "report" / "run.json")["results"]
    assert results["runs"] == 3 and {path.stem for path in (pipeline / "report" / "pictures").iterdir()} == {
        *("importance", "plan", "kv_cache"),
    }
    assert "No frontier is there: lightning run recipes/frontier.yaml" in page
    inputs = read_json(pipeline / "report" / "inputs.json")["inputs"]
    assert set(inputs) == {f"runs/all/{Path(stage['recipe']).stem}" for stage in STAGES}


@pytest.mark.slow
def test_a_pipeline_gives_what_its_stages_give_alone_also_after_a_kill(tmp_path: Path) -> None:
    content = {"command": "pipeline", "run_dir": "runs/all", "stages": [*STAGES, REPORT]}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(content))
    process = start(tmp_path, "all.yaml")
    deadline = time.monotonic() + 600
    while not (tmp_path / "runs/all/final_kl/config.yaml").is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=900)
    out = finish(start(tmp_path, "all.yaml"))
    assert out.count(": complete after") == 4
    made = json.loads((tmp_path / "runs/all/run.json").read_text())["results"]
    assert made["stages"] == 4 and made["cpu_seconds/final_kl"] > 1
    check_report(tmp_path / "runs/all")
    for stage in STAGES:
        words = [
            f"--{key}={json.dumps(value) if value is not None else 'null'}" for key, value in stage["overrides"].items()
        ]
        finish(start(tmp_path, str(stage["recipe"]), *[word.replace('"', "") for word in words]))
    assert weights(tmp_path / "runs/all/assemble") == weights(tmp_path / "runs/assemble")
    inputs = read_json(tmp_path / "runs/all/assemble/inputs.json")["inputs"]
    assert inputs["importance"]["path"] == "runs/all/final_kl"
