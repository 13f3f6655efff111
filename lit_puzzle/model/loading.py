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

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedModel

import lit_puzzle.model.sink_attention  # noqa: F401  (registers with transformers)
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.mxfp4 import expert_weight
from lit_puzzle.model.opening import load_config, load_generation_config

DtypeName = Literal["float32", "bfloat16", "float16", "float64"]


def load_model(
    folder: Path, dtype: DtypeName, attention: str = "eager", experts: str = "grouped_mm", device: str | None = None
) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        folder: checkpoint folder of a parent or a child.
        dtype: of all weights; MXFP4 experts allow bfloat16 only.
        attention: `eager`, or `sink_attention` for training and scoring in linear memory.
        experts: implementation of the experts: `grouped_mm`, `eager` or `batched_mm`.
        device: of the model; default: the CPU.

    Raises:
        ValueError: experts are stored as MXFP4 and `dtype` is not bfloat16.
    """
    quantized = _is_quantized(load_config(folder).to_dict(), folder, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        quantization_config=Mxfp4Config(dequantize=True) if quantized else None,
        attn_implementation=attention,
        experts_implementation=experts,
    )
    model.generation_config = load_generation_config(folder)
    return model.to(device) if device else model


def load_mapped(
    folder: Path, dtype: DtypeName, attention: str = "eager", experts: str = "grouped_mm"
) -> tuple[PreTrainedModel, WaitingExperts]:
    """Return the same model for weights that will be sharded: no process holds them all.

    Parameters are views of the mapped files where the dtypes agree. Where they differ, experts are on the meta device
    until `WaitingExperts.fill`, and all other parameters are converted at once.

    Args:
        folder: as for `load_model`.
        dtype: as for `load_model`.
        attention: as for `load_model`.
        experts: as for `load_model`.

    Returns:
        The model in evaluation mode, and its experts that are not read yet.

    Raises:
        ValueError: as for `load_model`, or the folder does not contain exactly the tensors its configuration implies.
    """
    checkpoint = Checkpoint(folder)
    config = load_config(folder)
    if _is_quantized(config.to_dict(), folder, dtype):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention, experts_implementation=experts
        )
    model.generation_config = load_generation_config(folder)
    waiting = WaitingExperts(checkpoint)
    for prefix, module in model.named_modules():
        for name, empty in module.named_parameters(recurse=False):
            waiting.take(module, name, f"{prefix}.{name}", empty)
    model.tie_weights()
    return model.eval(), waiting


class WaitingExperts:
    """Expert parameters that are still on the meta device, and the files that they will be read from.

    They are registered by module, so that wrapping a layer (adapters, a scoring rule) does not lose them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names: dict[nn.Module, dict[str, str]] = {}

    def take(self, module: nn.Module, name: str, full_name: str, empty: Tensor) -> None:
        """Fill one parameter from the files at once, or register that it waits."""
        stored = self._checkpoint.tensors.get(full_name)
        if stored is None and full_name == "lm_head.weight":
            return  # tied to the embedding
        if f".{self._checkpoint.family.layer.experts}." in full_name and (
            stored is None or self._read(full_name).dtype != empty.dtype
        ):
            self._names.setdefault(module, {})[name] = full_name
        else:
            _put(module, name, self._read(full_name).to(empty.dtype), empty.requires_grad)

    def fill(self, inside: nn.Module) -> None:
        """Read and convert every waiting parameter inside a module."""
        for module in inside.modules():
            for name, full_name in self._names.pop(module, {}).items():
                empty = module.get_parameter(name)
                _put(module, name, self._read(full_name).to(empty.dtype), empty.requires_grad)

    def _read(self, full_name: str) -> Tensor:
        if full_name in self._checkpoint.tensors:
            return self._checkpoint.read(full_name)
        blocks, scales = (self._checkpoint.read(f"{full_name}_{part}") for part in ("blocks", "scales"))
        return expert_weight(blocks, scales)


def _put(module: nn.Module, name: str, values: Tensor, requires_grad: bool) -> None:
    module.register_parameter(name, nn.Parameter(values, requires_grad=requires_grad))


def _is_quantized(config: Mapping[str, Any], folder: Path, dtype: DtypeName) -> bool:
    quantized = config.get("quantization_config") is not None
    if quantized and dtype != "bfloat16":
        raise ValueError(f"{folder} has MXFP4 experts, which are dequantized to bfloat16; dtype is {dtype!r}.")
    return quantized
