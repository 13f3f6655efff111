"""Make an engine from settings and a checkpoint folder.

Reads the checkpoint; writes nothing. vLLM is imported only where it is asked for.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_puzzle.generation.data_parallel import DataParallelEngine, engines_of
from lit_puzzle.generation.engine import Engine
from lit_puzzle.generation.policy import load_policy
from lit_puzzle.generation.sampling import EngineSettings
from lit_puzzle.generation.transformers_engine import TransformersEngine


def load_engine(settings: EngineSettings, checkpoint: Path, device: str | None = None) -> Engine:
    """Load a checkpoint folder, a parent or a child, into the engine, or engines, that the settings name.

    Args:
        settings: which engine, how many, and how they run.
        checkpoint: folder of the model and its tokenizer.
        device: where transformers puts the model; None: the GPU if there is one. vLLM and several engines choose for
            themselves.

    Raises:
        ValueError: vLLM is asked for and is not installed or does not start, several GPUs for one engine without vLLM,
            or more engines than there are GPUs for.
    """
    if settings.server is not None:
        from lit_puzzle.generation.server_engine import ServerEngine

        return ServerEngine(settings.server, checkpoint)
    if not _is_vllm(settings):
        settings.refuse_tensor_parallel()
    count = engines_of(settings)
    return load_one(settings, checkpoint, device) if count == 1 else DataParallelEngine(settings, checkpoint, count)


def load_one(
    settings: EngineSettings,
    checkpoint: Path,
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
) -> Engine:
    """Load a checkpoint folder into one engine in this process.

    Args:
        settings: which engine, and how it runs.
        checkpoint: folder of the model and its tokenizer.
        device: where transformers puts the model; None: the GPU if there is one.
        options: further arguments of `vllm.LLM`.
        temperature: that vLLM's log-probabilities are of.

    Raises:
        ValueError: vLLM is asked for and is not installed or does not start, or several GPUs without vLLM.
    """
    if _is_vllm(settings):
        from lit_puzzle.generation.vllm_engine import load_vllm

        return load_vllm(checkpoint, settings, options, temperature)
    settings.refuse_tensor_parallel()
    model, tokenizer = load_policy(checkpoint, settings.dtype, device)
    return TransformersEngine(model, tokenizer, settings.batch_size)


def _is_vllm(settings: EngineSettings) -> bool:
    usable = torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
    return settings.name == "vllm" or (settings.name == "auto" and usable)
