"""Stages that run without a Trainer, on several processes of Lightning Fabric: devices, sharding, sums.

Reads a checkpoint folder; writes nothing. The decoder layers are sharded over the processes (FSDP2, one group for each
layer and no root, so that layers can be called one by one); embedding, last norm and head stay whole on each process.
Fabric starts the other processes by running the same command line again, unless torchrun or SLURM has started them.

Memory of one of R processes, P parameters of b bytes, L layers, V vocabulary, D channels: P b / R + 2 P b / L while
layers run one after the other + 2 V D b. Source: PyTorch FSDP2, arXiv 2304.11277.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_puzzle.model.blocks import PuzzleModel, with_own_blocks
from lit_puzzle.model.loading import DtypeName, load_model
from lit_puzzle.model.streaming import LayerSource, ResidentModel, load_streamed
from lit_puzzle.run.peers import connect
from lit_puzzle.training.patience import patience
from lit_puzzle.training.sharding import load_for
from lit_puzzle.training.started import started_by

DTYPES: dict[str, DtypeName] = {
    "32-true": "float32",
    "bf16-true": "bfloat16",
    "16-true": "float16",
    "64-true": "float64",
}


@dataclass(frozen=True)
class FabricSettings:
    """Where a stage runs.

    Args:
        accelerator: Fabric's name for it: auto, cpu, gpu, ...
        devices: processes on a node, one per device; "auto" takes all devices.
        num_nodes: number of machines.
        precision: precision of all weights and of the arithmetic.
        strategy: `sharded` splits the layers over the processes, `replicated` loads the whole parent on each.
        timeout_hours: how long processes wait for one another. The first process alone samples the data and writes the
            table at the end, while the others wait at a barrier; PyTorch's default of 10 to 30 minutes would stop the
            run there.
        memory_gib: GiB that a process may take for weights and activations (on a CPU its anonymous memory, on a GPU
            what is allocated there): the parent is then read one layer at a time, by every process for its own batches.
            None: the parent is in memory as `strategy` says.
        unshard_evaluations: whether sharded weights are gathered once for all completions of a candidate; False
            gathers every layer for every token, for parents that do not fit on a device.

    Raises:
        ValueError: a timeout below a second or above a year.
    """

    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    precision: Literal["32-true", "bf16-true", "16-true", "64-true"] = "32-true"
    strategy: Literal["sharded", "replicated"] = "sharded"
    timeout_hours: float = 24.0
    memory_gib: float | None = None
    unshard_evaluations: bool = True

    def __post_init__(self) -> None:
        patience("fabric", self.timeout_hours)


def launch(settings: FabricSettings) -> Fabric:
    """Start the other processes and join them."""
    make = partial(Fabric, accelerator=settings.accelerator, devices=settings.devices, num_nodes=settings.num_nodes)
    fabric = make()
    if not isinstance(fabric.strategy, SingleDeviceStrategy):  # how many "auto" devices are is known only now
        fabric = make(strategy=DDPStrategy(timeout=patience("fabric", settings.timeout_hours)))
    fabric.launch()
    connect(fabric.global_rank, fabric.world_size, fabric.broadcast, started_by(fabric.strategy.launcher))
    return fabric


def load_parent(fabric: Fabric, settings: FabricSettings, folder: Path) -> PuzzleModel:
    """Return the frozen parent in evaluation mode on this process's device, its layers sharded if the settings say so.

    Raises:
        ValueError: MXFP4 experts in another precision than bf16-true.
    """
    dtype = DTYPES[settings.precision]
    if fabric.world_size == 1 or settings.strategy == "replicated":
        model = with_own_blocks(load_model(folder, dtype, "sink_attention", device=str(fabric.device)))
        return model.requires_grad_(False).eval()
    mesh = init_device_mesh(fabric.device.type, (fabric.world_size,), mesh_dim_names=("data_parallel",))
    loaded, waiting = load_for(mesh, folder, dtype, "sink_attention")
    model = with_own_blocks(loaded).requires_grad_(False).eval()
    for layer in model.model.layers:
        layer.requires_grad_(False)
        # Each group is called by itself, which makes it a root, and by default a root keeps what it gathered.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        if waiting is not None:
            waiting.fill_shares(layer)
    for module in (model.model.embed_tokens, model.model.norm, model.model.rotary_emb, model.lm_head):
        module.to(fabric.device)
    return model


def open_parent(fabric: Fabric, settings: FabricSettings, folder: Path, head: bool) -> LayerSource:
    """Return the frozen parent: read layer by layer where the settings give a budget, else as `load_parent` does.

    Args:
        fabric: the processes.
        settings: where the stage runs.
        folder: the parent's.
        head: whether the head is used.

    Raises:
        ValueError: as `load_parent`, or a budget smaller than one layer needs.
    """
    if settings.memory_gib is None:
        return ResidentModel(load_parent(fabric, settings, folder), fabric.device)
    return load_streamed(folder, DTYPES[settings.precision], settings.memory_gib, device=fabric.device, head=head)


def sum_over_processes(fabric: Fabric, tensor: Tensor) -> Tensor:
    """Return the sum of a CPU tensor over all processes, on the CPU of each."""
    if fabric.world_size == 1:
        return tensor
    total = fabric.all_reduce(tensor.to(fabric.device, copy=True), reduce_op="sum")
    assert isinstance(total, torch.Tensor)
    return total.cpu()
