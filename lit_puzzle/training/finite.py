"""Stops a run whose loss or weights are no longer finite, on all processes together, before anything of it is saved.

The loss is checked before each update, whose state before it is saved; the weights right after it, before any callback
can write a checkpoint: so every checkpoint has finite weights. Reads and writes nothing. Cost: one pass over the
weights that train, an update.
"""

import math

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from lit_puzzle.run.stopped_training import TrainingStoppedError

ADVICE = (
    "Lower the learning rate or clip gradients (trainer.gradient_clip_val), and start again with --overwrite. The "
    "checkpoints there are of earlier updates."
)


def raise_together(reason: str | None) -> None:
    """Raise on every process if one has a reason; every process must call it.

    Args:
        reason: what is wrong on this process; None: nothing.

    Raises:
        TrainingStoppedError: one process has a reason; the message is that of the first.
    """
    reasons: list[str | None] = [reason]
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        reasons = [None] * distributed.get_world_size()
        distributed.all_gather_object(reasons, reason)
    for found in reasons:
        if found is not None:
            raise TrainingStoppedError(found)


def check_loss(trainer: Trainer, loss: Tensor) -> None:
    """Check the loss of a batch.

    Raises:
        TrainingStoppedError: it is not finite on one process at least; the message names the update.
    """
    if not trainer.strategy.reduce_boolean_decision(bool(loss.isfinite().all())):
        raise TrainingStoppedError(
            f"The loss is {float(loss)} at update {trainer.global_step + 1} (of one process at least). {ADVICE}"
        )


def check_weights(trainer: Trainer, module: LightningModule, update: int) -> None:
    """Check the weights that train, right after an update.

    Args:
        trainer: the run's Trainer.
        module: the module whose weights train.
        update: number of the update, counted from 1.

    Raises:
        ValueError: one is not finite on one process at least; the message names the update.
    """
    if not trainer.strategy.reduce_boolean_decision(largest_weight(module) < math.inf):
        raise ValueError(f"Weights are not finite after update {update}. {ADVICE}")


def largest_weight(module: nn.Module) -> float:
    """Return the largest magnitude among this process's weights that train; NaN if one of them is."""
    weights = [parameter.detach() for parameter in module.parameters() if parameter.requires_grad]
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    filled = [weight for weight in local if weight.numel()]  # a process may have no row of a small tensor
    return float(nn.utils.get_total_norm(filled, norm_type=math.inf)) if filled else 0.0
