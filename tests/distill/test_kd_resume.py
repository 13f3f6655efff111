"""Global distillation that is killed resumes bit for bit: one process and two."""

import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distillation_runs import Models, fit, make_models, results, weights
from helpers.recovery_runs import forked, kill_self, losses, validations

from lit_puzzle.run.open_run import write_errors
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


def fill_disk(step: int) -> None:
    """Let no file grow beyond 5,000 bytes from the fifth update on."""
    if step == 5:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_keeps_the_checkpoint_before(models: Models, tmp_path: Path) -> None:
    whole, full = tmp_path / "whole", tmp_path / "full"

    def work(rank: int) -> None:
        said = f"{full}.* cannot be written: (File too large|.*probably No space left on device)"
        with pytest.raises(ValueError, match=said), write_errors(full):
            fit(full, models, 8, on_step=fill_disk)

    assert forked(1, work) == [0]
    assert {path.name for path in (full / "checkpoints").glob("*.ckpt")} == {"step=2.ckpt", "step=4.ckpt"}
    for folder in (full, whole):
        assert forked(1, lambda rank, folder=folder: fit(folder, models, 8)) == [0]  # type: ignore[misc]
    assert losses(full) == losses(whole) and results(full) == results(whole)
