"""The distillation recipe as a user starts it, on two processes by `--trainer.devices=2`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.distillation_runs import Models, make_models
from helpers.stored_shards import names_in_halves

RECIPE = Path(__file__).parents[2] / "recipes" / "distill.yaml"


@pytest.fixture
def models(tmp_path: Path, tiny_config: Any) -> Models:
    return make_models(tmp_path, tiny_config)


@pytest.mark.slow
def test_devices_alone_shard_the_recipe(models: Models, tmp_path: Path) -> None:
    """The shipped recipe with `--trainer.devices=2`, launched as a user does: every trained tensor in two halves."""
    small = {
        "run_dir": tmp_path / "run",
        "model.init_args.child": RECIPE.parent.parent / "lit_puzzle" / "assets" / "tiny_child",
        "data.init_args.documents": models.documents,
        "data.init_args.filter.written_by": "any",
        "data.init_args.sequence_tokens": 64,
        "data.init_args.batch_size": 1,
        "model.init_args.evaluation.prompts_per_effort": 2,
        "model.init_args.evaluation.max_new_tokens": 4,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.devices": 2,
    }
    words = [f"--{key}={value}" for key, value in small.items()]
    command = [sys.executable, "-m", "lit_puzzle", "run", str(RECIPE), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    stored = names_in_halves(next((tmp_path / "run" / "best").glob("*.ckpt")))
    assert stored and not any(".experts." in name or ".router." in name or "parent" in name for name in stored)
    results = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    assert {"accuracy/high/gain", "loss/first", "val_loss/best"} < results.keys()
