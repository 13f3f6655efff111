"""The wheel: complete without a checkout, and importing the parts that must stay light loads nothing heavy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]


def test_wheel_carries_recipes_callbacks_and_assets(tmp_path):
    ignored = shutil.ignore_patterns(".git", ".venv", "run.folder", "build", "*.egg-info", "__pycache__", ".*_cache")
    source = shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=ignored)
    subprocess.run([*PIP, "--no-build-isolation", "--target", tmp_path / "site", source], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    run = [sys.executable, "-P", "-m", "lit_puzzle"]
    listed = subprocess.check_output([*run, "recipes"], cwd=tmp_path, env=environment, text=True)
    assert "recipes/rl_recover.yaml" in listed.split()
    package = tmp_path / "site" / "lit_puzzle"
    assert (package / "callbacks" / "generation_length.py").is_file()
    for model in ("tiny_parent", "tiny_child"):
        names = {path.name for path in (package / "assets" / model).iterdir()}
        assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert (package / "costs" / "gpus.json").is_file()
    assert sum(path.stat().st_size for path in (package / "assets").rglob("*")) < 10_000_000


LIGHT = (
    "spec",
    "cli",
    "run.recipe",
    "run.folder",
    "run.renamed",
    "model.family",
    "model.layout",
    "costs.cost_model",
    "costs.measured_kernels",
    "search.search",
    "data.packing_settings",
    "training.settings",
    "distill.settings",
    "rl.settings",
)


@pytest.mark.parametrize("module", [f"lit_puzzle.{name}" for name in LIGHT])
def test_light_modules_import_neither_torch_nor_lightning(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
