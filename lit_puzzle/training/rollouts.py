"""What a training does with an engine of vLLM beside it, whatever its loss: start it, and stop together if it fails.

Reads and writes nothing. Memory and traffic: `lit_puzzle.generation.rollout_engine`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lit_puzzle.generation.engine import EngineFailedError
from lit_puzzle.generation.ranks import Ranks
from lit_puzzle.generation.rollout_engine import RolloutEngine
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.model.loading import DtypeName
from lit_puzzle.training.finite import raise_together


def ranks_of(trainer: Trainer) -> Ranks:
    """Return the processes of a run."""
    return Ranks(trainer.global_rank, trainer.world_size, trainer.local_rank, trainer.world_size // trainer.num_nodes)


def start_engine(
    settings: RolloutSettings, child: Path, trainer: Trainer, dtype: DtypeName, temperature: float
) -> RolloutEngine | None:
    """Start the engine that the settings name; None where the model that trains generates.

    Args:
        settings: of rollouts.
        child: folder that training started from.
        trainer: the run's Trainer.
        dtype: of the weights of the model that trains.
        temperature: that log-probabilities are of.

    Raises:
        ValueError: the engine does not start.
    """
    if settings.engine == "transformers":
        return None
    is_half = "bf16" in str(trainer.precision) or dtype == "bfloat16"
    chosen = settings.dtype if settings.dtype != "auto" else "bfloat16" if is_half else "float32"
    return RolloutEngine(settings, child, chosen, temperature, ranks_of(trainer))


def call_together(call: Callable[[], Any]) -> Any:
    """Return what a call returns; an engine that fails on one process stops all of them with its reason.

    Raises:
        EngineFailedError: one failed.
    """
    reason, answer = None, None
    try:
        answer = call()
    except ValueError as error:
        reason = str(error)
    try:
        raise_together(reason)
    except ValueError as error:
        raise EngineFailedError(str(error)) from None
    return answer
