"""Engines in processes of their own, beside a model that lives in this one: a folder is measured while training waits.

The engines share the GPUs with whatever this process, and others of the same job, hold there: vLLM is given
`GPU_SHARE` of the part that is free on the fullest of their GPUs. What they took is free when the context ends. No
process group of this process reaches them.

Reads the checkpoint in every engine; writes nothing. Memory: that of the engines. Traffic: token ids, through pipes,
and one number between the processes of the job. The GPU's side has never run: no GPU was at hand.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import distributed

from lit_puzzle.generation.data_parallel import DataParallelEngine, engines_of
from lit_puzzle.generation.engine import Engine
from lit_puzzle.generation.sampling import EngineSettings

GPU_SHARE = 0.92  # vLLM's own default, of a GPU that nobody else uses


def free_share() -> float | None:
    """Return which share of its GPU's memory is free in the process that has least; None without GPUs.

    Every process of the job calls this.
    """
    if not torch.cuda.is_available():
        return None
    gc.collect()
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    share = torch.tensor(free_bytes / total_bytes, device="cuda")
    if distributed.is_initialized():
        distributed.all_reduce(share, distributed.ReduceOp.MIN)
    return float(share)


@contextmanager
def engines_apart(settings: EngineSettings, checkpoint: Path, free: float | None = None) -> Iterator[Engine]:
    """Provide the engine, or engines, that the settings name, in processes of their own that end with the context.

    Args:
        settings: which engine, how many, and how they run.
        checkpoint: folder of the model and its tokenizer.
        free: what `free_share` returns.

    Raises:
        ValueError: one of them does not start.
    """
    options = {} if free is None else {"gpu_memory_utilization": GPU_SHARE * free}
    engines = DataParallelEngine(settings, checkpoint, engines_of(settings), options)
    try:
        yield engines
    finally:
        engines.close()
