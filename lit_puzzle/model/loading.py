"""Loads the model of a checkpoint folder, of a parent or a child, with plain or MXFP4 experts.

Reads the folder; code in the folder is not run. MXFP4 experts are dequantized to bfloat16 (frozen): the packed kernels
of transformers need one number of experts for all layers, which a child does not have.

`load_model` loads the weights into this process. `load_mapped` returns the same model for weights that will be sharded:
they stay in mapped files, and of experts that must be converted each process reads and converts its own rows when
their layer has been sharded.
Anonymous memory of one of N processes, for P parameters of b bytes, X of them outside the experts, L layers:

    P b                               load_model
    P b / N + P b / L                 load_mapped, then `lit_puzzle.training.sharding.shard` (+ X b when dtypes differ)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lit_puzzle.model.decoding_attention
import lit_puzzle.model.sink_attention  # noqa: F401
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.mxfp4 import expert_weight
from lit_puzzle.model.opening import load_config, load_generation_config
from lit_puzzle.model.safetensors_file import DTYPES
from lit_puzzle.model.values import check_values, has_values
from lit_puzzle.run.library_calls import library_errors

DtypeName = Literal["float32", "bfloat16", "float16", "float64"]


def load_model(
    folder: Path, dtype: DtypeName, attention: str = "eager", experts: str = "grouped_mm", device: str | None = None
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, by `Checkpoint` alone.

    Args:
        folder: checkpoint folder of a parent or a child.
        dtype: of all weights; MXFP4 experts allow bfloat16 only. With float16, norms stay in float32.
        attention: `eager`, or `sink_attention` for training and scoring in linear memory.
        experts: implementation of the experts: `grouped_mm` (in float64 `eager` instead), `eager` or `batched_mm`.
        device: of the model; default: the CPU.

    Raises:
        ValueError: the folder does not contain exactly the tensors its configuration implies, a value is not finite, a
            weight file does not match SHA256SUMS, or experts are stored as MXFP4 and `dtype` is not bfloat16.
    """
    checkpoint, model = empty_model(folder, dtype, attention, experts)
    checkpoint.check_checksums()
    for prefix, module in list(model.named_modules()):
        for name, empty in list(module.named_parameters(recurse=False)):
            full_name = f"{prefix}.{name}"
            if not is_tied(checkpoint, full_name):
                put(module, name, loaded(checkpoint, full_name, empty.dtype, device or "cpu"), empty.requires_grad)
    model.tie_weights()
    return model.to(device).eval() if device else model.eval()


def load_mapped(
    folder: Path, dtype: DtypeName, attention: str = "eager", experts: str = "grouped_mm"
) -> tuple[PreTrainedModel, WaitingExperts]:
    """Return the same model for weights that will be sharded: no process holds them all.

    Parameters are views of the mapped files where the dtypes agree. Where they differ, experts are on the meta device
    until `WaitingExperts.fill`, and all other parameters are converted at once. Every process of a group calls
    this: the first one compares weight files with SHA256SUMS, each checks the values of what it converts and of its
    share of the rows of expert views, which it keeps when they are sharded; what one process refuses, all refuse.

    Args:
        folder: as for `load_model`.
        dtype: as for `load_model`.
        attention: as for `load_model`.
        experts: as for `load_model`.

    Returns:
        The model in evaluation mode, and its experts that are not read yet.

    Raises:
        ValueError: as for `load_model`.
    """
    checkpoint, model = empty_model(folder, dtype, attention, experts)
    waiting = WaitingExperts(checkpoint)
    for prefix, module in list(model.named_modules()):
        for name, empty in list(module.named_parameters(recurse=False)):
            waiting.take(module, name, f"{prefix}.{name}", empty)
    model.tie_weights()
    _check_shares(checkpoint, waiting.views)
    return model.eval(), waiting


def _check_shares(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Check one share of the rows of tensors in each process; raise in all what one finds."""
    grouped = distributed.is_initialized()
    rank, processes = (distributed.get_rank(), distributed.get_world_size()) if grouped else (0, 1)
    with _refused_together():
        if rank == 0:
            checkpoint.check_checksums()
        for name in names:
            for rows in checkpoint.view(name).chunk(processes)[rank : rank + 1]:  # as FSDP2 divides them
                check_values(name, rows, checkpoint.tensors[name].file)


@contextmanager
def _refused_together() -> Iterator[None]:
    """Raise in all processes what the body refuses in one; every process must come here."""
    found: list[str | None] = [None]
    try:
        yield
    except ValueError as error:
        found = [str(error)]
    if distributed.is_initialized():
        own, found = found[0], [None] * distributed.get_world_size()
        distributed.all_gather_object(found, own)
    for message in found:
        if message is not None:
            raise ValueError(message)


def empty_model(folder: Path, dtype: DtypeName, attention: str, experts: str) -> tuple[Checkpoint, PreTrainedModel]:
    """Return the opened checkpoint, and its model with all parameters on the meta device in their final dtypes."""
    checkpoint, config = Checkpoint(folder), load_config(folder)
    if checkpoint.mxfp4_layers:
        if dtype != "bfloat16":
            raise ValueError(f"{folder} has MXFP4 experts, which are dequantized to bfloat16; dtype is {dtype!r}.")
        del config.quantization_config
    if dtype == "float64" and experts == "grouped_mm":
        experts = "eager"  # PyTorch has no grouped product of this dtype
    what = f"{folder} with attention {attention!r} and experts {experts!r}"
    with library_errors(what), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention, experts_implementation=experts
        )
    if dtype == "float16":
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in (model._keep_in_fp32_modules or ()):
                module.float()
    model.generation_config = load_generation_config(folder)
    return checkpoint, model


class WaitingExperts:
    """Expert parameters that are still on the meta device, and the files that they will be read from.

    They are registered by module, so that wrapping a layer (adapters, a scoring rule) does not lose them.

    Attributes:
        views: names of the experts that are views of the files already; their values are not checked.
        bytes_read: bytes of the experts that this process has converted, as stored.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names: dict[nn.Module, dict[str, str]] = {}
        self.views: list[str] = []
        self.bytes_read = 0

    def take(self, module: nn.Module, name: str, full_name: str, empty: Tensor) -> None:
        """Fill one parameter from the files at once, or register that it waits."""
        if is_tied(self._checkpoint, full_name):
            return
        stored = self._checkpoint.tensors.get(full_name)
        if f".{self._checkpoint.family.layer.experts}." not in full_name:
            values = self._checkpoint.read(full_name).to(empty.dtype)
        elif stored is not None and DTYPES[stored.dtype] == empty.dtype:
            values = self._checkpoint.view(full_name)
            self.views.append(full_name)
        else:
            self._names.setdefault(module, {})[name] = full_name
            return
        put(module, name, values, empty.requires_grad)

    def fill(self, inside: nn.Module) -> None:
        """Read and convert every waiting parameter inside a module, whole."""
        for module in inside.modules():
            for name, full_name in self._names.pop(module, {}).items():
                empty = module.get_parameter(name)
                values = loaded(self._checkpoint, full_name, empty.dtype)
                self.bytes_read += stored_bytes(self._checkpoint, full_name)
                put(module, name, values, empty.requires_grad)

    def fill_shares(self, inside: nn.Module) -> None:
        """Read and convert this process's rows of every waiting parameter inside a module that is sharded already.

        Every process calls this, in the same order: what one refuses, all refuse.

        Raises:
            ValueError: a value that some process reads is not finite.
        """
        with _refused_together():
            for module in inside.modules():
                for name, full_name in self._names.pop(module, {}).items():
                    empty = module.get_parameter(name)
                    assert isinstance(empty, DTensor)
                    mesh = empty.device_mesh
                    values = self._rows(full_name, len(empty), mesh.get_local_rank(), mesh.size())
                    local = values.to(mesh.device_type, empty.dtype, copy=full_name in self._checkpoint.tensors)
                    share = DTensor.from_local(local, mesh, empty.placements, shape=empty.shape, stride=empty.stride())
                    put(module, name, share, empty.requires_grad)

    def _rows(self, full_name: str, rows: int, rank: int, processes: int) -> Tensor:
        """Return the rows of a tensor that FSDP2 gives to a process: those of torch.chunk."""
        share = -(-rows // processes)
        mine = slice(min(rank * share, rows), min((rank + 1) * share, rows))
        parts = [self._checkpoint.view(name)[mine] for name in stored_names(self._checkpoint, full_name)]
        for name, part in zip(stored_names(self._checkpoint, full_name), parts, strict=True):
            if has_values(name, self._checkpoint.tensors[name].dtype):
                check_values(name, part, self._checkpoint.tensors[name].file)
            self.bytes_read += part.nbytes
        return parts[0] if len(parts) == 1 else expert_weight(parts[0], parts[1])


def is_tied(checkpoint: Checkpoint, full_name: str) -> bool:
    """Return whether a parameter is the embedding under another name."""
    return full_name == "lm_head.weight" and full_name not in checkpoint.tensors


def stored_names(checkpoint: Checkpoint, full_name: str) -> tuple[str, ...]:
    """Return the names under which a parameter is stored: its own, or those of MXFP4 blocks and scales."""
    if full_name in checkpoint.tensors:
        return (full_name,)
    return (f"{full_name}_blocks", f"{full_name}_scales")


def stored_bytes(checkpoint: Checkpoint, full_name: str) -> int:
    """Return the bytes of a parameter as it is stored."""
    return sum(checkpoint.tensors[name].num_bytes for name in stored_names(checkpoint, full_name))


def loaded(checkpoint: Checkpoint, full_name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return a checked parameter in memory of its own, dequantized on the device if it is stored as MXFP4."""
    parts = [checkpoint.read(name) for name in stored_names(checkpoint, full_name)]
    if len(parts) == 1:
        return parts[0].to(device, dtype, copy=True)
    return expert_weight(parts[0].to(device), parts[1].to(device)).to(dtype)


def put(module: nn.Module, name: str, values: Tensor, requires_grad: bool) -> None:
    """Give a module's parameter other values."""
    module.register_parameter(name, nn.Parameter(values, requires_grad=requires_grad))
