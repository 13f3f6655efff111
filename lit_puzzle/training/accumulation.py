"""The weight of a batch's loss where an epoch ends inside an update.

Lightning divides the loss of every batch by A = accumulate_grad_batches and updates after A batches, and after the last
batch of an epoch, however few they are. An epoch of N batches ends with an update of n = N mod A batches (if n > 0),
which would be too small by n / A; each of their losses is multiplied by A / n. Reads and writes nothing.
"""

import math

from lightning.pytorch import Trainer


def batch_weight(trainer: Trainer, batch_idx: int) -> float:
    """Return the factor of a batch's loss, so that every update is the mean over its own batches.

    Args:
        trainer: the run's Trainer.
        batch_idx: number of the batch in its epoch.

    Returns:
        1.0 but in the last, incomplete update of an epoch.

    Raises:
        ValueError: gradients are accumulated over data without a known number of batches.
    """
    accumulated, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if accumulated == 1:
        return 1.0
    if math.isinf(batches):
        raise ValueError(
            f"trainer.accumulate_grad_batches={accumulated} was given with data of unknown length: how many batches "
            "the last update of an epoch has is not known. Give data with a length, or trainer.limit_train_batches"
        )
    last = int(batches) % accumulated
    return accumulated / last if last and batch_idx >= int(batches) - last else 1.0
