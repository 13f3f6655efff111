"""Loads a parent or a child, whatever its folder holds: stock gpt-oss, a puzzle child, MXFP4 experts or not.

Reads a checkpoint folder; remote code of the folder is never run. MXFP4 experts are de-quantized to bfloat16: they are
computed with, never trained, and the packed kernels of transformers read one model-wide number of experts, which a
child does not have.

Two ways, the same model: `load_model` holds the weights in this process. `load_mapped`, for weights that are about to
be sharded, leaves them in mapped files, and experts that must be converted wait until their layer is sharded.
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
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Mxfp4Config, PreTrainedModel

import lit_puzzle.model.blocks
import lit_puzzle.model.sink_attention  # noqa: F401  (both register with transformers)
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.mxfp4 import expert_weight

DtypeName = Literal["float32", "bfloat16", "float16", "float64"]


def load_model(
    folder: Path, dtype: DtypeName, attention: str = "eager", experts: str = "grouped_mm", device: str | None = None
) -> PreTrainedModel:
    """Loads a causal language model.

    Args:
        folder: Checkpoint folder, gpt_oss or gpt_oss_puzzle.
        dtype: Of all weights; MXFP4 experts allow bfloat16 only.
        attention: `eager`, or `sink_attention` for training and scoring in linear memory.
        experts: Implementation of the experts: `grouped_mm`, `eager` or `batched_mm`.
        device: Where to put it; default: the CPU.

    Raises:
        ValueError: MXFP4 experts are asked for in another dtype than bfloat16.
    """
    quantized = _is_quantized(AutoConfig.from_pretrained(folder).to_dict(), folder, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        quantization_config=Mxfp4Config(dequantize=True) if quantized else None,
        attn_implementation=attention,
        experts_implementation=experts,
    )
    return model.to(device) if device else model


def load_mapped(
    folder: Path, dtype: DtypeName, attention: str = "eager", experts: str = "grouped_mm"
) -> tuple[PreTrainedModel, WaitingExperts]:
    """The same model for weights that will be sharded: no process ever holds them all.

    Parameters are views of the mapped files where the dtypes agree; what does not lie in experts is converted where
    they differ; experts that must be converted are on the meta device until `WaitingExperts.fill`.

    Args:
        folder: As for `load_model`.
        dtype: As for `load_model`.
        attention: As for `load_model`.
        experts: As for `load_model`.

    Returns:
        The model in evaluation mode, and its experts that wait.

    Raises:
        ValueError: As `load_model`, and when the folder does not hold exactly the tensors its configuration implies.
    """
    checkpoint = Checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    if _is_quantized(config.to_dict(), folder, dtype):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention, experts_implementation=experts
        )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    waiting = WaitingExperts(checkpoint)
    for prefix, module in model.named_modules():
        for name, empty in module.named_parameters(recurse=False):
            waiting.take(module, name, f"{prefix}.{name}", empty)
    model.tie_weights()
    return model.eval(), waiting


class WaitingExperts:
    """Expert parameters that are still on the meta device, and the files they will come from.

    They are known by their modules, so that wrapping a layer (adapters, a scoring rule) does not lose them.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names: dict[nn.Module, dict[str, str]] = {}

    def take(self, module: nn.Module, name: str, full_name: str, empty: Tensor) -> None:
        """Fills one parameter from the files at once, or notes that it waits."""
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
        """Reads and converts every waiting parameter inside a module."""
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
        raise ValueError(f"{folder} has MXFP4 experts, which are de-quantized to bfloat16; dtype is {dtype!r}.")
    return quantized
