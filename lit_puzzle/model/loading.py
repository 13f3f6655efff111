"""One way to load a parent or a child, whatever its folder holds: stock gpt-oss, a puzzle child, MXFP4 experts or not.

Reads a checkpoint folder. MXFP4 experts are de-quantised to bfloat16: they are computed with, never trained, and the
packed kernels of transformers read one model-wide number of experts, which a child does not have. Memory: the weights,
on every process; remote code of the folder is never run.
"""

from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config, PreTrainedModel

import lit_puzzle.model.gpt_oss  # noqa: F401  (registers gpt_oss_puzzle)

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
    quantisation = None
    if AutoConfig.from_pretrained(folder).to_dict().get("quantization_config") is not None:
        if dtype != "bfloat16":
            raise ValueError(f"{folder} has MXFP4 experts, which are de-quantised to bfloat16; dtype is {dtype!r}.")
        quantisation = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        quantization_config=quantisation,
        attn_implementation=attention,
        experts_implementation=experts,
    )
    return model.to(device) if device else model
