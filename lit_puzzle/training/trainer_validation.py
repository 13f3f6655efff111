"""What training a child needs of the Trainer, checked before anything slow.

Reads and writes: nothing. Each check stands for a run that would otherwise go wrong without saying so.
"""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_puzzle.training.checkpoints import UpdateCheckpoint
from lit_puzzle.training.sharding import Sharded

PRECISIONS = ("32-true", "bf16-mixed")  # in half precision throughout, small steps of weights are lost


def check_trainer(trainer: Trainer, dtype: str) -> None:
    """Checks strategy, sampler, precision and checkpoints; `dtype` is that of the frozen weights.

    Raises:
        ValueError: gradients would not be averaged, data be shared out twice, trained weights be rounded, or
            checkpoints lose gradients.
    """
    if trainer.world_size > 1 and not isinstance(trainer.strategy, Sharded):
        raise ValueError(
            f"{trainer.world_size} processes with the strategy {type(trainer.strategy).__name__}: gradients would "
            "not be averaged. Set trainer.strategy to lit_puzzle.training.sharding.Sharded."
        )
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError("Processes share the data out themselves: set trainer.use_distributed_sampler: false.")
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
