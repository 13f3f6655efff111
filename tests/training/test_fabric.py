"""fabric.py: one process makes no group; several wait for one another as long as `timeout_hours`."""

import time
from functools import partial

import pytest
import torch
from helpers.recovery_runs import forked
from lightning.fabric.strategies import SingleDeviceStrategy
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from lit_puzzle.training.fabric import FabricSettings, launch, sum_over_processes

HOUR = 3600


def test_one_process_makes_no_group():
    fabric = launch(FabricSettings(accelerator="cpu"))
    assert fabric.world_size == 1 and isinstance(fabric.strategy, SingleDeviceStrategy)
    assert not distributed.is_initialized()
    assert sum_over_processes(fabric, torch.tensor([2.0])).tolist() == [2.0]


def group_timeout(group: distributed.ProcessGroup | None) -> float:
    assert group is not None
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def timeouts_of(settings: FabricSettings, hours: float, rank: int) -> None:
    fabric = launch(settings)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    assert group_timeout(distributed.group.WORLD) == hours * HOUR
    assert group_timeout(mesh.get_group()) == hours * HOUR  # that of the sharded layers
    assert sum_over_processes(fabric, torch.tensor([rank + 1.0])).tolist() == [3.0]


@pytest.mark.parametrize(("given", "hours"), [({}, 24), ({"timeout_hours": 3}, 3)])
def test_processes_wait_for_hours(given, hours):
    settings = FabricSettings(accelerator="cpu", devices=2, **given)
    assert forked(2, partial(timeouts_of, settings, hours)) == [0, 0]


def the_first_is_slow(settings: FabricSettings, rank: int) -> None:
    fabric = launch(settings)
    fabric.barrier()
    if rank == 0:
        time.sleep(4)
    else:
        with pytest.raises(RuntimeError, match=r"[Tt]imed? ?out"):
            fabric.barrier()


def test_the_wait_ends():
    settings = FabricSettings(accelerator="cpu", devices=2, timeout_hours=1.5 / HOUR)
    assert forked(2, partial(the_first_is_slow, settings)) == [0, 0]
