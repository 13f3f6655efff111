"""kill -9 on the writing of documents as a user starts it: the same command again ends with the same files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GptOssForCausalLM

from lit_puzzle.data.document_files import DocumentFolder
from lit_puzzle.data.generate import generate
from lit_puzzle.data.prompt_source import PromptSource
from lit_puzzle.distill.top_logits_files import TopLogits
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.tiny.world import Chains, Counting, Sorting

RECIPES = Path(__file__).parents[2] / "recipes"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(folder: Path, name: str, **settings: Any) -> tuple[list[str], Path]:
    """A packaged recipe with other settings; its command and its run folder."""
    run_dir, recipe = folder / name, folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({"base": str(RECIPES / f"{name}.yaml"), "run_dir": str(run_dir)} | settings))
    return [sys.executable, "-m", "lit_puzzle", "run", str(recipe)], run_dir


def make_parent(folder: Path, config: Any) -> Path:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, tokenizer.eos_token_id, None
    GptOssForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_killed_and_resumed_documents_and_their_logits(tiny_config, tmp_path):
    parent = make_parent(tmp_path / "parent", tiny_config(max_position_embeddings=256))
    small = {"engine": {"name": "transformers", "batch_size": 8}, "sampling": {"max_new_tokens": 24}, "shard_size": 8}
    words, run_dir = command(tmp_path, "generate", parent=str(parent), prompts={"num_prompts": 48}, **small)
    folder = run_dir / "documents"
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        while not (folder / "shard-00001.parquet").exists():
            assert process.poll() is None, process.stderr and process.stderr.read().decode()[-2000:]
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    made = files(folder)
    assert "shard-00005.parquet" not in made and "documents.json" not in made and not (run_dir / "run.json").exists()
    (folder / ".shard-00005.parquet.partial").write_bytes(b"half a sha")  # as if killed while writing
    subprocess.run(words, check=True, env=ENVIRONMENT, capture_output=True)
    record = json.loads((run_dir / "run.json").read_text())

    (tmp_path / "whole").mkdir()
    prompts = PromptSource([Chains(), Sorting(), Counting()], num_prompts=48)
    engine = EngineSettings("transformers", batch_size=32)
    results = generate(tmp_path / "whole", parent, prompts, Sampling(24), engine, shard_size=8)
    assert record["resumed"] and record["results"] == results
    whole = files(tmp_path / "whole" / "documents")
    assert files(folder) == whole and all(whole[name] == made[name] for name in made if name in whole)

    words, run_dir = command(tmp_path, "precompute_logits", parent=str(parent), documents=str(folder))
    subprocess.run(words, check=True, env=ENVIRONMENT, capture_output=True)
    record = json.loads((run_dir / "run.json").read_text())
    assert record["results"]["targets"] == results["targets"] and 0 < record["results"]["kept_mass"] < 1
    assert TopLogits(run_dir / "top_logits", DocumentFolder(folder)).record["top_k"] == 16
