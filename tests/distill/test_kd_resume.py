"""Global distillation that is killed resumes bit for bit: one process and two."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distillation_runs import Models, fit, make_models, results, weights
from helpers.recovery_runs import forked, kill_self, losses, validations

from lit_puzzle.training.settings import LoraSettings, TrainingSettings


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Models:
    return make_models(tmp_path_factory.mktemp("kd"), tiny_config)


def kill_at(at: int) -> Any:
    return lambda step: kill_self() if step == at else None


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(models: Models, tmp_path: Path, processes: int) -> None:
    """With averages, dropout in adapters, and validation between; killed right before a checkpoint would be due."""
    adapters = TrainingSettings(lora=LoraSettings(rank=2, dropout=0.3))
    settings: dict[str, Any] = {"ema_decay": 0.8, "training": adapters, "processes": processes}
    data = {"batch_size": 2 // processes}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    go = lambda folder, rank, **more: fit(folder, models, 8, rank=rank, data=data, **settings, **more)  # noqa: E731
    assert forked(processes, lambda rank: go(whole, rank)) == [0] * processes
    assert forked(processes, lambda rank: go(killed, rank, on_step=kill_at(5))) == [-9] * processes
    assert not (killed / "results0.json").exists()
    assert forked(processes, lambda rank: go(killed, rank)) == [0] * processes
    for rank in range(processes):
        assert losses(killed, rank) == losses(whole, rank) and len(losses(whole, rank)) == 8
    assert validations(killed) == validations(whole) and results(killed) == results(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(killed)[name], tensor), name
    children = [(folder / "child" / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert children[0] == children[1]
