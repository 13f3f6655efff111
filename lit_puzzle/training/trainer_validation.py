"""Validation of a Trainer's settings for training a child, before anything slow.

Reads and writes nothing. Without these checks such a run would train or resume wrongly without an error.
"""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_puzzle.training.checkpoints import UpdateCheckpoint
from lit_puzzle.training.sharding import Sharded

PRECISIONS = ("32-true", "bf16-mixed")  # weights in half precision would round small steps away


def check_trainer(trainer: Trainer, dtype: str) -> None:
    """Check strategy, sampler, precision and checkpoint callbacks.

    Args:
        trainer: the run's Trainer.
        dtype: dtype of the frozen weights.

    Raises:
        ValueError: settings with which gradients would not be averaged, data would be divided twice among processes,
            trained weights would be rounded, or checkpoints would lose accumulated gradients.
    """
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} was given; it must be at least 1."
        )
    if trainer.world_size > 1 and not isinstance(trainer.strategy, Sharded):
        raise ValueError(
            f"{trainer.world_size} processes with the strategy {type(trainer.strategy).__name__}: gradients would "
            "not be averaged. Set trainer.strategy to lit_puzzle.training.sharding.Sharded."
        )
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError("The data is already divided among the processes: set trainer.use_distributed_sampler: false.")
    if trainer.precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision={trainer.precision} was given; trained weights stay in float32: one of {PRECISIONS}. "
            "Frozen weights get theirs by the module's dtype."
        )
    if dtype != "float32" and str(trainer.precision) == "32-true":
        raise ValueError(f"dtype {dtype} beside trained float32 weights needs trainer.precision: bf16-mixed.")
    unsafe = [
        type(callback).__name__
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
        and callback._every_n_train_steps
        and not isinstance(callback, UpdateCheckpoint)
    ]
    if unsafe and trainer.accumulate_grad_batches > 1:
        raise ValueError(
            f"{unsafe} may save in the middle of gradient accumulation, which cannot be resumed. "
            "Use lit_puzzle.training.checkpoints.UpdateCheckpoint."
        )
