"""Sharding with FSDP2: the same recipe runs on one CPU core, one GPU or several GPUs.

`Sharded` is a Lightning strategy whose mesh has all processes in one dimension; the mesh is made when the processes
start, so that `--trainer.devices=2` alone shards. `shard` applies FSDP2 to a causal language model: each decoder layer
is one group, the root (embedding, last norm, head) another. With one process no module is wrapped.

Checkpoints are folders of torch.distributed.checkpoint with a file `meta.pt`. They contain the trainable parameters
only; the frozen ones are read from the model's own folder. A folder gets its name by a rename when it is complete: a
process that is killed while it writes or removes a checkpoint leaves a `*.partial` folder.

Memory of a process, for P parameters of b bytes, L layers, N processes: P b / N, + one layer while loading
(`lit_puzzle.model.loading`), + 2 P b / L while layers run one after the other, + P b while `unsharded` (rollouts).
Traffic of a training step: 3 P b per process (gathers in forward and backward, scatter of gradients); of a rollout: P b
if unsharded, else P b for each token. Disk of a checkpoint: trainable parameters x (b + optimizer state).

Reads and writes checkpoint folders. Source: PyTorch FSDP2 (`torch.distributed.fsdp.fully_shard`), arXiv 2304.11277.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lit_puzzle.model.loading import DtypeName, WaitingExperts, load_mapped, load_model
from lit_puzzle.run.peers import connect
from lit_puzzle.training.patience import patience
from lit_puzzle.training.started import started_by
from lit_puzzle.training.stored_checkpoints import METADATA, load_plain, load_sharded
from lit_puzzle.training.trainable import keep_master_weights

PARTIAL = ".partial"
_TRAINABLE = StateDictOptions(ignore_frozen_params=True, strict=False)


def load_for(
    mesh: DeviceMesh | None, folder: Path, dtype: DtypeName, attention: str, experts: str = "grouped_mm"
) -> tuple[PreTrainedModel, WaitingExperts | None]:
    """Load a model that `shard` then shards: from mapped files where the mesh has several processes, else at once.

    With one process each tensor goes to the mesh's device as it is read: the model is never whole in the memory of the
    machine.

    Args:
        mesh: mesh of the running strategy; None where nothing is sharded.
        folder: checkpoint folder.
        dtype: dtype of all weights.
        attention: implementation of attention.
        experts: implementation of the experts.

    Returns:
        The model, and the experts that `shard` fills; None where all weights are loaded.
    """
    if mesh is None or mesh.size() == 1:
        return load_model(folder, dtype, attention, experts, None if mesh is None else mesh.device_type), None
    return load_mapped(folder, dtype, attention, experts)


def shard(
    model: nn.Module,
    layers: nn.ModuleList,
    mesh: DeviceMesh | None,
    waiting: WaitingExperts | None = None,
    trains: bool = False,
) -> None:
    """Shard a model in place over the `data_parallel` dimension of a mesh of several processes.

    Call it after freezing and after LoRA and before the optimizer is built, so that optimizer state exists for local
    shards of trainable parameters only.

    Args:
        model: the module whose `forward` is called in training and in generation; it becomes the FSDP root.
        layers: its decoder layers, one group each.
        mesh: mesh of the running strategy (`LightningModule.device_mesh`).
        waiting: experts of which each process reads its own rows when their layer has been sharded.
        trains: turns trainable parameters into float32, with one process too.
    """
    data_parallel = None if mesh is None or mesh.size() == 1 else mesh["data_parallel"]
    for layer in layers if data_parallel is not None else ():
        if trains:
            keep_master_weights(layer)
        fully_shard(layer, mesh=data_parallel)
        if waiting is not None:
            waiting.fill_shares(layer)
    if trains:
        keep_master_weights(model)
    if data_parallel is not None:
        fully_shard(model, mesh=data_parallel)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather every group once and keep it for the body, so that generation needs no communication.

    Processes may generate different numbers of tokens inside. Needs memory for the whole model; does nothing to a model
    that is not sharded. Afterwards each group again keeps or frees its parameters after forward as before (by default a
    root keeps them and layers do not).
    """
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    reshards = [_reshards_after_forward(group) for group in groups]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group, reshard in zip(groups, reshards, strict=True):
            group.reshard()
            group.set_reshard_after_forward(reshard, recurse=False)


def _reshards_after_forward(group: FSDPModule) -> bool:
    """Return the group's setting, which PyTorch does not offer publicly.

    A setting that is left to PyTorch is decided at the first forward pass: a root then keeps its parameters.
    """
    state = group._get_fsdp_state()
    undecided_root = state._auto_reshard_after_forward and _holds_groups(group)
    return not undecided_root and all(part.post_forward_mesh_info is not None for part in state._fsdp_param_groups)


def _holds_groups(group: FSDPModule) -> bool:
    assert isinstance(group, nn.Module)
    return any(isinstance(module, FSDPModule) for module in group.modules() if module is not group)


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor, gathered from all processes if it is sharded (every process must call it)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_trainable(model: nn.Module, folder: Path) -> None:
    """Load the trainable parameters of `model` from a checkpoint of any number of processes.

    Args:
        model: the module to which the checkpoint's names refer (the LightningModule).
        folder: a folder of `Sharded`, or a single file of another strategy (models that are not sharded).

    Raises:
        ValueError: the checkpoint is damaged.
    """
    if folder.is_file():
        model.load_state_dict(load_plain(folder)["state_dict"], strict=False)
        return
    state = {"state_dict": get_model_state_dict(model, options=_TRAINABLE)}
    load_sharded(state, folder)
    set_model_state_dict(model, state["state_dict"], options=_TRAINABLE)


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes of the run; with one process nothing is sharded.

    Args:
        process_group_backend: communication backend; by default nccl on GPUs and gloo on CPU.
        timeout_hours: how long a process waits for another one in a collective. Rollouts are of unequal length, and the
            first process alone packs data: PyTorch's default of 10 to 30 minutes would stop the run there. A process
            that fails ends the others at once, whatever the timeout (`lit_puzzle.run.peers`).

    Raises:
        ValueError: a timeout below a second or above a year.
    """

    def __init__(self, process_group_backend: str | None = None, timeout_hours: float = 24.0) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            timeout=patience("strategy", timeout_hours),
        )

    def setup_environment(self) -> None:
        """Size the mesh, and connect the processes; Lightning's "auto" would make all devices tensor-parallel."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        connect(self.global_rank, self.world_size, self.broadcast, started_by(self.launcher))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the trainable parameters and persistent buffers as sharded tensors on the CPU."""
        assert self.model is not None
        options = StateDictOptions(ignore_frozen_params=True, cpu_offload=True)
        return get_model_state_dict(self.model, options=options)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write under a temporary name, then rename; every process calls it, the first renames and removes.

        Raises:
            OSError: it cannot be written, as the library that writes says it; the checkpoint before it stays.
        """
        target = Path(self.broadcast(filepath))
        partial = _partial(target)
        if self.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        self.barrier("partial removed")
        failures: list[BaseException] = []
        try:
            super().save_checkpoint(checkpoint, partial, storage_options)
        except CheckpointException as error:  # of all processes; it is no Exception, so that nobody would explain it
            failures = [cause for cause, _ in error.failures.values()]
        if failures:  # raised here, it keeps what it was raised by
            raise failures[0]
        self.barrier("partial written")
        if self.is_global_zero:
            self.remove_checkpoint(target)
            partial.rename(target)
        self.barrier("checkpoint renamed")

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Rename the folder, then remove it, so that a half removed folder cannot be mistaken for a checkpoint."""
        folder = Path(filepath)
        if self.is_global_zero and folder.is_dir():
            doomed = folder.rename(folder.with_name(f"{folder.name}.removed{PARTIAL}"))
            shutil.rmtree(doomed)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load trainable parameters and optimizer state into place, and return everything else.

        Raises:
            ValueError: a path that is not a complete checkpoint folder, or a damaged one.
        """
        folder = Path(self.broadcast(checkpoint_path))
        if not (folder / METADATA).is_file():
            raise ValueError(
                f"{folder} is not a complete checkpoint of this strategy (a folder with {METADATA}). "
                "Remove it to resume from an older one."
            )
        assert self.model is not None
        load_trainable(self.model, folder)
        for index, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{index}": get_optimizer_state_dict(self.model, optimizer)}
            load_sharded(state, folder)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state[f"optimizer_{index}"])
        rest: Mapping[str, Any] = load_plain(folder / METADATA)
        return dict(rest)


def _partial(target: Path) -> Path:
    return target.with_name(target.name + PARTIAL)
