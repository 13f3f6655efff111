"""FSDP2 on two CPU processes: shards by halves, agrees with one process, resumes after a kill, by the recipe alone."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.grpo_settings import change
from helpers.recovery_runs import (
    GRPO,
    Fingerprint,
    Recorder,
    checkpoints,
    forked,
    kill_self,
    losses,
    make_child,
    make_data,
    make_module,
    make_trainer,
)
from helpers.stored_shards import names_in_halves
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_puzzle.rl.settings import ExtraReward, GRPOSettings, RewardSettings
from lit_puzzle.tiny.world import Counting
from lit_puzzle.training.fabric import FabricSettings, launch
from lit_puzzle.training.lightning import sound_checkpoint
from lit_puzzle.training.settings import LoraSettings, TrainingSettings
from lit_puzzle.training.sharding import full, shard, unsharded

SCRIPTED = change(GRPO, steps_per_generation=None, num_iterations=1, loss_type="dapo")
RECIPE = Path(__file__).parents[2] / "recipes" / "rl_recover.yaml"


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Path:
    folder = tmp_path_factory.mktemp("sharding") / "child"
    return make_child(folder, tiny_config(num_hidden_layers=2), experts=(4, 2))


def reward_sum(*, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Varied within every group."""
    return [sum(ids) % 7 / 3 for ids in completion_ids]


def script_completions(trainer: Any) -> None:
    """Generation runs, but its random result is replaced by one that depends on prompt and index only."""
    generate = trainer._generate_single_turn

    def scripted(prompt_ids: list[list[int]], *rest: Any) -> tuple[list[list[int]], None]:
        generated, _ = generate(prompt_ids, *rest)
        assert len(generated) == len(prompt_ids)
        places = [(sum(ids), place % 4) for place, ids in enumerate(prompt_ids)]
        return [[8 + (seed + 13 * place + 5 * step) % 100 for step in range(2 + place)] for seed, place in places], None

    trainer._generate_single_turn = scripted


class Watcher(Recorder):
    """Keeps the first gradients and, on sharded models, checks the shards of a rank."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        script_completions(pl_module.engine._trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step > 0:
            return
        model = pl_module.model
        gradients = {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        torch.save(gradients, self.file.parent / f"gradients{trainer.global_rank}.pt")
        if trainer.world_size > 1:
            look_at_shards(model)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        (self.file.parent / f"validated{trainer.global_rank}.json").write_text(json.dumps(values))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        state = trainer.optimizers[0].state
        assert set(state) == {p for p in pl_module.parameters() if p.requires_grad}
        assert all(type(state[p]["exp_avg"]) is type(p.data) for p in state)
        weights = {name: full(p).detach().clone() for name, p in pl_module.model.named_parameters()}
        torch.save(weights, self.file.parent / f"weights{trainer.global_rank}.pt")


def look_at_shards(model: Any) -> None:
    """Every parameter is a DTensor of half its elements; gathered inside `unsharded`, and a shard again after it."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.to_local().numel() * 2 == parameter.numel(), name
    with unsharded(model):
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def toy_groups(rooted: bool) -> Any:
    """Four layers, each a group; with a root, its own layer is one more."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    if rooted:
        shard(model, nn.ModuleList(list(model)[:3]), mesh)
        return model
    for layer, reshard in zip(model, (True, False, True, True), strict=True):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    return model


def settings_are_restored(rank: int) -> None:
    launch(FabricSettings(accelerator="cpu", devices=2))
    kept_after_forward = {True: [False, False, False, True], False: [False, True, False, False]}
    for rooted, forward_first in itertools.product((True, False), (True, False)):
        model = toy_groups(rooted)
        if forward_first:
            model(torch.ones(2, 4))
        for _ in range(2):
            with unsharded(model):
                model(torch.ones(2, 4))
                assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            model(torch.ones(2, 4))
            kept = [not isinstance(parameter, DTensor) for parameter in model.parameters()]
            assert kept == kept_after_forward[rooted], (rooted, forward_first)


def test_unsharded_restores_each_groups_own_setting() -> None:
    assert forked(2, settings_are_restored) == [0, 0]


@dataclass(frozen=True)
class Scripted:
    """What differs between the scripted runs; `bf16` freezes weights in bfloat16 and computes in mixed precision."""

    processes: int
    grpo: GRPOSettings = SCRIPTED
    lora: LoraSettings | None = None
    bf16: bool = False


RUNS = {
    "one": Scripted(1),
    "two": Scripted(2),
    "two in step": Scripted(2, change(SCRIPTED, unshard_rollouts=False)),
    "one lora": Scripted(1, change(SCRIPTED, beta=0.05), LoraSettings(rank=4)),
    "two lora": Scripted(2, change(SCRIPTED, beta=0.05), LoraSettings(rank=4)),
    "two bf16": Scripted(2, bf16=True),
}


def scripted_run(folder: Path, child: Path, run: Scripted, rank: int) -> None:
    """Three updates on 8 completions a step, whatever the number of processes, then a validation."""
    grpo = change(run.grpo, completions_per_device=8 // run.processes)
    precision = "bf16-mixed" if run.bf16 else "32-true"
    settings = {"accumulate_grad_batches": 1, "val_check_interval": 3, "precision": precision}
    watcher = Watcher(folder, rank=rank)
    trainer = make_trainer(folder, run.processes, 3, [watcher], enable_checkpointing=False, **settings)
    # AdamW divides by the gradient's size: without a large eps it would blow up rounding where gradients vanish.
    adam = partial(torch.optim.AdamW, lr=3e-3, eps=1e-3)
    torch.manual_seed(0)  # of the adapters
    module = make_module(
        child,
        grpo=grpo,
        training=TrainingSettings(lora=run.lora, dtype="bfloat16" if run.bf16 else "float32"),
        rewards=RewardSettings(answer_format="whole"),
        extra_rewards=[ExtraReward(reward_sum)],
        optimizer=adam,
        lr_scheduler=None,
    )
    trainer.fit(module, datamodule=make_data(environments=[Fingerprint(), Counting()]))
    saved = load_file(folder / "child" / "model.safetensors")
    for name, parameter in module.model.named_parameters():
        assert ".lora_" in name or torch.equal(full(parameter), saved[name.replace(".base_layer.", ".")].to(parameter))
    (folder / f"results{rank}.json").write_text(json.dumps(module.results))


@pytest.fixture(scope="module")
def scripted_runs(child: Path) -> dict[str, Path]:
    """Each run of `RUNS`, and its folder."""
    folders = {name: child.parent / name for name in RUNS}
    for name, run in RUNS.items():
        folders[name].mkdir()
        assert forked(run.processes, partial(scripted_run, folders[name], child, run)) == [0] * run.processes, name
    return folders


@pytest.mark.parametrize(("single", "sharded"), [("one", "two"), ("one", "two in step"), ("one lora", "two lora")])
@pytest.mark.slow
def test_two_processes_agree_with_one(scripted_runs: dict[str, Path], single: str, sharded: str) -> None:
    """The same batch: the same gradients, weights, and completions; frozen weights do not move."""
    for kind in ("gradients", "weights"):
        one = torch.load(scripted_runs[single] / f"{kind}0.pt", weights_only=True)
        for rank in (0, 1):
            two = torch.load(scripted_runs[sharded] / f"{kind}{rank}.pt", weights_only=True)
            assert one.keys() == two.keys()
            for name, tensor in one.items():
                torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-5, msg=f"{kind} {name} on {rank}")
    gradients = torch.load(scripted_runs[single] / "gradients0.pt", weights_only=True)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-2
    results = [json.loads((scripted_runs[run] / "results0.json").read_text()) for run in (single, sharded)]
    assert results[0] == pytest.approx(results[1], abs=1e-6)


@pytest.mark.parametrize("sharded", ["two", "two in step"])
@pytest.mark.slow
def test_two_processes_validate_like_one(scripted_runs: dict[str, Path], sharded: str) -> None:
    """Every completion counts once: each changes the mean, because its score is a fingerprint of its text."""
    one = json.loads((scripted_runs["one"] / "validated0.json").read_text())
    per_effort = ("accuracy", "tokens", "unfinished", "no_final", "looping")
    expected = {f"val/{name}/{effort}" for name in per_effort for effort in ("low", "high")}
    assert expected | {"val/accuracy", "val/score"} <= one.keys()
    assert one["val/accuracy"] not in (0.0, 1.0)
    for rank in (0, 1):
        assert json.loads((scripted_runs[sharded] / f"validated{rank}.json").read_text()) == pytest.approx(one)


@pytest.mark.slow
def test_two_processes_train_float32_beside_frozen_bfloat16(scripted_runs: dict[str, Path], child: Path) -> None:
    folder = scripted_runs["two bf16"]
    start = load_file(child / "model.safetensors")
    ends = [torch.load(folder / f"weights{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ends[0].keys() == start.keys()
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
        frozen = ".experts." in name or ".router." in name
        assert tensor.dtype == (torch.bfloat16 if frozen else torch.float32)
        assert torch.equal(tensor.float(), start[name].float()) == frozen, name
    assert all(math.isfinite(float.fromhex(loss)) for rank in (0, 1) for loss in losses(folder, rank).values())
    assert len(losses(folder, 0)) == 3


def sampled_run(folder: Path, child: Path, rank: int, kill_at: int) -> None:
    def on_step(step: int) -> None:
        if step == kill_at:
            kill_self()

    folder.mkdir(exist_ok=True)
    trainer = make_trainer(folder, 2, 6, [Recorder(folder, on_step, rank), *checkpoints()])
    module = make_module(child, grpo=change(GRPO, completions_per_device=2))
    trainer.fit(module, datamodule=make_data(), ckpt_path=sound_checkpoint(folder))


@pytest.mark.slow
def test_two_killed_processes_resume_bit_for_bit(child: Path) -> None:
    whole, killed = child.parent / "whole", child.parent / "killed"
    assert forked(2, lambda rank: sampled_run(whole, child, rank, kill_at=-1)) == [0, 0]
    assert forked(2, lambda rank: sampled_run(killed, child, rank, kill_at=5)) == [-9, -9]
    assert forked(2, lambda rank: sampled_run(killed, child, rank, kill_at=-1)) == [0, 0]
    for rank in (0, 1):
        assert losses(killed, rank) == losses(whole, rank)
    assert losses(whole, 0) != losses(whole, 1), "both processes sampled the same"
    assert sound_checkpoint(whole) is not None


@pytest.mark.slow
def test_devices_alone_shard_the_recipe(child: Path, tmp_path: Path) -> None:
    """The shipped recipe with `--trainer.devices=2`, launched as a user does: every trained tensor in two halves."""
    small = {
        "run_dir": tmp_path / "run",
        "model.init_args.child": child,
        "model.init_args.grpo.sampling.max_new_tokens": 4,
        "model.init_args.grpo.completions_per_device": 8,
        "model.init_args.grpo.num_generations": 4,
        "model.init_args.evaluation.prompts_per_effort": 2,
        "data.init_args.held_out_per_effort": 2,
        "data.init_args.train_prompts": 32,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.devices": 2,
    }
    words = [f"--{key}={value}" for key, value in small.items()]
    command = [sys.executable, "-m", "lit_puzzle", "run", str(RECIPE), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    best = next((tmp_path / "run" / "best").glob("*.ckpt"))
    stored = names_in_halves(best)
    assert len(stored) == 2 * 2 * 4 and all(".lora_" in name for name in stored)  # of 2 layers: A and B of q, k, v, o
    assert "accuracy/low/gain" in json.loads((tmp_path / "run" / "run.json").read_text())["results"]
