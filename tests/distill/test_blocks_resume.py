"""Blockwise distillation that is killed resumes bit for bit: one process and two."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.block_runs import fit, library_bytes, make_inputs
from helpers.recovery_runs import forked, kill_self, losses


def kill_at(at: int) -> Any:
    return lambda step: kill_self() if step == at else None


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tiny_config: Any, tmp_path: Path, processes: int) -> None:
    """With a schedule, clipping, and validations between; killed right before a checkpoint would be due."""
    inputs = make_inputs(tmp_path, tiny_config)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    data = {"batch_size": 2 // processes}

    def go(folder: Path, on_step: Any = None) -> list[int | None]:
        return forked(processes, lambda rank: fit(folder, inputs, 8, processes, rank, on_step=on_step, data=data))

    assert go(whole) == [0] * processes
    assert go(killed, kill_at(5)) == [-9] * processes
    assert not (killed / "library").exists()
    assert go(killed) == [0] * processes
    for rank in range(processes):
        assert losses(killed, rank) == losses(whole, rank) and len(losses(whole, rank)) == 8
    assert torch.load(killed / "results.pt") == torch.load(whole / "results.pt")
    assert library_bytes(killed) == library_bytes(whole)
