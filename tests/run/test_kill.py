"""kill -9 on the main job as a user starts it, inside writing too: the same command again loses nothing."""

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

from lit_puzzle.training.metrics_file import MetricsFile

ROOT = Path(__file__).parents[2]
UPDATES = 6


def write_recipe(folder: Path, name: str) -> tuple[list[str], Path]:
    """The main job made small, with a checkpoint after every second update; its command and its run folder."""
    callback = "lit_puzzle.training.checkpoints."
    saves = {"class_path": callback + "UpdateCheckpoint", "init_args": {"every_n_updates": 2}}
    content: dict[str, Any] = {
        "base": str(ROOT / "recipes" / "rl_recover.yaml"),
        "run_dir": str(folder / name),
        "trainer": {"max_steps": UPDATES, "val_check_interval": 3, "callbacks": [saves]},
        "model": {"init_args": {"evaluation": {"prompts_per_effort": 4}}},
        "data": {"init_args": {"held_out_per_effort": 4}},
    }
    content["trainer"]["callbacks"].append({"class_path": callback + "BestCheckpoint"})
    content["model"]["init_args"]["grpo"] = {
        "completions_per_device": 16,
        "sampling": {"max_new_tokens": 40},
    }
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(content))
    return [sys.executable, "-m", "lit_puzzle", "run", str(recipe)], folder / name


def kill_when(command: list[str], pattern: str, run_dir: Path) -> None:
    """Starts the command and kills it as soon as a file of this pattern appears in its run folder."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()) as process:
        while not any(run_dir.glob(pattern)):
            assert process.poll() is None, process.stderr and process.stderr.read().decode()[-2000:]
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("pattern", ["checkpoints/step=4.ckpt.partial/*", "child*/**/model*.safetensors"])
@pytest.mark.slow
def test_a_killed_job_resumes_bit_for_bit(tmp_path, whole, pattern):
    command, run_dir = write_recipe(tmp_path, "killed")
    kill_when(command, pattern, run_dir)
    assert not (run_dir / "run.json").exists()
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    record, expected = (json.loads((folder / "run.json").read_text()) for folder in (run_dir, whole))
    assert record["resumed"] and not expected["resumed"]
    assert record["results"] == expected["results"]
    logged = [list(MetricsFile(folder / "logs" / "metrics.csv").rows()) for folder in (run_dir, whole)]
    assert [step for step, metrics in logged[1] if "train/loss" in metrics] == list(range(UPDATES))
    assert logged[0] == logged[1]
    weights = [(folder / "child" / "model.safetensors").read_bytes() for folder in (run_dir, whole)]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    command, run_dir = write_recipe(tmp_path_factory.mktemp("whole"), "whole")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir
