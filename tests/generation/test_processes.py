"""Generation over two processes: weights gathered in every forward pass, or once, and shares of unequal size."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.recovery_runs import forked
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from lit_puzzle.generation.policy import load_policy
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.transformers_engine import TransformersEngine
from lit_puzzle.training.fabric import FabricSettings, launch
from lit_puzzle.training.sharding import shard, unsharded

PARENT = Path(__file__).parents[2] / "lit_puzzle" / "assets" / "tiny_parent"
PROMPTS = [[1, 8, 3, 13, token] for token in range(14, 21)]
SAMPLING = Sampling(12, seed=5)


def two_processes(folder: Path, mode: str, first_has: int, rank: int) -> None:
    launch(FabricSettings(accelerator="cpu", devices=2))
    model, tokenizer = load_policy(PARENT, "float32", "cpu")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    shard(model, model.model.layers, mesh)
    rows = range(first_has) if rank == 0 else range(first_has, len(PROMPTS))
    engine = TransformersEngine(model, tokenizer, 3)
    generate = partial(engine.generate, [PROMPTS[row] for row in rows], SAMPLING, rows)
    if mode == "in step":
        model._is_fsdp_managed_module = True
        completions = generate()
        assert all(isinstance(parameter, DTensor) for parameter in model.model.layers.parameters())
    else:
        with unsharded(model):
            completions = generate()
    (folder / f"{rank}.json").write_text(json.dumps([done.token_ids for done in completions]))


@pytest.mark.parametrize("mode", ["in step", "gathered"])
@pytest.mark.parametrize("first_has", [7, 2])
@pytest.mark.slow
def test_two_processes_generate_like_one(tmp_path, mode, first_has):
    """With 7 the second process has no prompt at all."""
    assert forked(2, partial(two_processes, tmp_path, mode, first_has)) == [0, 0]
    found = [row for rank in (0, 1) for row in json.loads((tmp_path / f"{rank}.json").read_text())]
    model, _ = load_policy(PARENT, "float32", "cpu")
    engine = TransformersEngine(model, AutoTokenizer.from_pretrained(PARENT), 128)
    with torch.no_grad():
        assert found == [done.token_ids for done in engine.generate(PROMPTS, SAMPLING)]
    assert len({len(row) for row in found}) > 1
