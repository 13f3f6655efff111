"""Checkpoints of a run: the newest ones to resume from, and the best weights by a validated metric.

Writes: `<run>/checkpoints/step=N.ckpt` (`UpdateCheckpoint`), `<run>/best/step=N.ckpt` (`BestCheckpoint`, weights only).
A new checkpoint is complete before an old one goes, so that a kill at any moment leaves one to resume from.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class UpdateCheckpoint(ModelCheckpoint):
    """Saves everything that resuming needs, every N updates, right after an update and never between two.

    Lightning's own rule also fires on the first batch after a resumed step, in the middle of gradient accumulation:
    such a checkpoint has lost the gradients accumulated so far, and what resumes from it is another run.

    Args:
        every_n_updates: optimiser steps between checkpoints.
        keep: newest checkpoints that stay on disk.
    """

    def __init__(self, every_n_updates: int = 10, keep: int = 2) -> None:
        if min(every_n_updates, keep) < 1:
            raise ValueError(f"every_n_updates={every_n_updates}, keep={keep} were given; each must be at least 1.")
        super().__init__(
            filename="{step}", monitor="step", mode="max", save_top_k=keep, every_n_train_steps=every_n_updates
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checkpoints belong to the run folder, whatever the logger's folder is."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves, unless this batch only added to the gradients."""
        is_last = batch_idx + 1 == trainer.num_training_batches
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or is_last:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights that validated best.

    Args:
        monitor: the validated metric.
        mode: whether a larger (`max`) or a smaller (`min`) value is better.
    """

    def __init__(self, monitor: str = "val/accuracy", mode: str = "max") -> None:
        super().__init__(filename="{step}", monitor=monitor, mode=mode, save_top_k=1, save_weights_only=True)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Apart from the checkpoints to resume from."""
        self.dirpath = str(Path(trainer.default_root_dir) / "best")
        super().setup(trainer, pl_module, stage)
