"""Loads the model of a checkpoint folder, of a parent or a child, with plain or MXFP4 experts.

Reads the folder; code in the folder is not run. MXFP4 experts are dequantized to bfloat16 (frozen): the packed kernels
of transformers need one number of experts for all layers, which a child does not have.

`load_model` loads the weights into this process. `load_mapped` returns the same model for weights that will be sharded:
they stay in mapped files, and experts that must be converted are read when their layer is sharded.
Anonymous memory of one of N processes, for P parameters of b bytes, X of them outside the experts, L layers:

    P b                               load_model
    P b / N + (P - X) b / L           load_mapped, then `lit_puzzle.training.sharding.shard` (+ X b when dtypes differ)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import lit_puzzle.model.sink_attention  # noqa: F401  (registers with transformers)
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.mxfp4 import expert_weight
from lit_puzzle.model.opening import load_config, load_generation_config
from lit_puzzle.model.safetensors_file import DTYPES
from lit_puzzle.model.values import check_values
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
    checkpoint, model = _empty(folder, dtype, attention, experts)
    checkpoint.check_checksums()
    for prefix, module in list(model.named_modules()):
        for name, empty in list(module.named_parameters(recurse=False)):
            full_name = f"{prefix}.{name}"
            if not _is_tied(checkpoint, full_name):
                stored = _stored(checkpoint, full_name)
                is_view = full_name in checkpoint.tensors  # dequantized experts have memory of their own
                values = stored.to(device or "cpu", empty.dtype, copy=is_view)
                _put(module, name, values, empty.requires_grad)
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
    checkpoint, model = _empty(folder, dtype, attention, experts)
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
    found: list[str | None] = [None] * processes
    try:
        if rank == 0:
            checkpoint.check_checksums()
        for name in names:
            for rows in checkpoint.view(name).chunk(processes)[rank : rank + 1]:  # as FSDP2 divides them
                check_values(name, rows, checkpoint.tensors[name].file)
    except ValueError as error:
        found[rank] = str(error)
    if grouped:
        distributed.all_gather_object(found, found[rank])
    for message in found:
        if message is not None:
            raise ValueError(message)


def _empty(folder: Path, dtype: DtypeName, attention: str, experts: str) -> tuple[Checkpoint, PreTrainedModel]:
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
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names: dict[nn.Module, dict[str, str]] = {}
        self.views: list[str] = []

    def take(self, module: nn.Module, name: str, full_name: str, empty: Tensor) -> None:
        """Fill one parameter from the files at once, or register that it waits."""
        if _is_tied(self._checkpoint, full_name):
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
        _put(module, name, values, empty.requires_grad)

    def fill(self, inside: nn.Module) -> None:
        """Read and convert every waiting parameter inside a module."""
        for module in inside.modules():
            for name, full_name in self._names.pop(module, {}).items():
                empty = module.get_parameter(name)
                _put(module, name, _stored(self._checkpoint, full_name).to(empty.dtype), empty.requires_grad)


def _is_tied(checkpoint: Checkpoint, full_name: str) -> bool:
    return full_name == "lm_head.weight" and full_name not in checkpoint.tensors


def _stored(checkpoint: Checkpoint, full_name: str) -> Tensor:
    """Return a checked tensor of the checkpoint, dequantized if it is stored as MXFP4."""
    if full_name in checkpoint.tensors:
        return checkpoint.read(full_name)
    blocks, scales = (checkpoint.read(f"{full_name}_{part}") for part in ("blocks", "scales"))
    return expert_weight(blocks, scales)


def _put(module: nn.Module, name: str, values: Tensor, requires_grad: bool) -> None:
    module.register_parameter(name, nn.Parameter(values, requires_grad=requires_grad))
