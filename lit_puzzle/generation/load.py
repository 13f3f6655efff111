"""Make an engine from settings and a checkpoint folder.

Reads the checkpoint; writes nothing. vLLM is imported only where it is asked for.
"""

import importlib.util
from pathlib import Path

import torch

from lit_puzzle.generation.engine import Engine
from lit_puzzle.generation.policy import load_policy
from lit_puzzle.generation.sampling import EngineSettings
from lit_puzzle.generation.transformers_engine import TransformersEngine


def load_engine(settings: EngineSettings, checkpoint: Path, device: str | None = None) -> Engine:
    """Load a checkpoint folder, a parent or a child, into the engine that the settings name.

    Args:
        settings: which engine, and how it runs.
        checkpoint: folder of the model and its tokenizer.
        device: where transformers puts the model; None: the GPU if there is one. vLLM chooses for itself.

    Raises:
        ValueError: vLLM is asked for and is not installed or does not start, or several GPUs without vLLM.
    """
    usable = torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
    if settings.name == "vllm" or (settings.name == "auto" and usable):
        from lit_puzzle.generation.vllm_engine import load_vllm

        return load_vllm(checkpoint, settings)
    settings.refuse_tensor_parallel()
    model, tokenizer = load_policy(checkpoint, settings.dtype, device)
    return TransformersEngine(model, tokenizer, settings.batch_size)
