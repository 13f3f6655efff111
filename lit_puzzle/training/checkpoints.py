"""Checkpoints of a run: the newest ones to resume from, and the best weights by a validated metric.

Writes `<run>/checkpoints/step=N.ckpt` (`UpdateCheckpoint`) and `<run>/best/step=N.ckpt` (`BestCheckpoint`, weights
only); reads nothing, Lightning resumes from them. A new checkpoint is complete before an old one is removed: a run that
is killed at any moment leaves a checkpoint to resume from, and the best weights that it names.
Disk: `keep` + 1 checkpoints to resume from; the best weights that the newest two of them name, and those of any better
validation since.
"""

import math
import signal
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.trainer.states import TrainerFn

from lit_puzzle.run.signals import StoppedError, defer_signals, noted_signal
from lit_puzzle.run.stopped_training import TrainingStoppedError
from lit_puzzle.training.logged_rows import begin_row, log_row


class UpdateCheckpoint(ModelCheckpoint):
    """Saves everything that resuming needs every N updates, right after an update.

    Where a validation is due at that update, it saves after the validation, because Lightning counts a validation that
    was due at the resumed step as done. Lightning's own rule also fires on the first batch after a resumed step, in the
    middle of gradient accumulation: that checkpoint lacks the gradients accumulated so far, and a run that resumes from
    it differs from the uninterrupted one.

    Args:
        every_n_updates: optimizer steps between checkpoints.
        keep: newest checkpoints that stay on disk.

    Raises:
        ValueError: numbers below 1.
    """

    def __init__(self, every_n_updates: int = 10, keep: int = 2) -> None:
        if min(every_n_updates, keep) < 1:
            raise ValueError(f"every_n_updates={every_n_updates}, keep={keep} were given; each must be at least 1.")
        super().__init__(
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_updates,
            enable_version_counter=False,
        )
        self.every_n_updates = every_n_updates
        self._waits_for_validation = self._stops = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the checkpoints into the run folder, whatever the logger's folder is."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless this batch only accumulated gradients or a validation comes first.

        Raises:
            StoppedError: a signal came during the update, whose result is saved now.
        """
        is_last = batch_idx + 1 == trainer.num_training_batches
        updated = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or is_last
        self._stops = updated and _any_process_stops(trainer)
        if not updated or (trainer.global_step % self.every_n_updates and not self._stops):
            return
        fit_loop = trainer.fit_loop
        assert fit_loop._data_fetcher is not None
        self._waits_for_validation = fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)
        if not self._waits_for_validation:
            log_row(trainer)
            self._save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let a signal wait for the end of the update, after which the state can be saved."""
        begin_row(trainer, batch_idx)
        defer_signals(True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a signal stop a validation at once, unless a checkpoint waits for its end."""
        defer_signals(self._stops)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a signal stop what comes after training at once."""
        defer_signals(False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the checkpoint that waited for this validation.

        Not when the validation has stopped the run: a resumed run has to repeat the validation to stop there too.
        """
        if self._waits_for_validation and not trainer.should_stop:
            self._save(trainer)
        self._waits_for_validation = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state before the batch in which an engine beside the training failed, or a number ran away.

        The batch counts as not begun. In the middle of gradient accumulation nothing is saved: the gradients so far
        would be missing.
        """
        if not isinstance(exception, TrainingStoppedError) or trainer.validating:
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.current.completed % trainer.accumulate_grad_batches:
            return
        for counts in (progress.total, progress.current):
            assert isinstance(counts, _ProcessedTracker)
            counts.ready = counts.started = counts.completed
        if not self._should_skip_saving_checkpoint(trainer):  # already saved after this update, or none was made
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        if self._stops:
            defer_signals(False)
            raise StoppedError(noted_signal() or signal.SIGTERM)


def _any_process_stops(trainer: Trainer) -> bool:
    """Return whether a signal has come to one of the processes; all get the same answer."""
    noted = noted_signal() is not None
    return noted if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(noted, all=False)


class BestCheckpoint(Callback):
    """Keeps the weights with the best validated metric.

    It is no `Checkpoint` of Lightning, because Lightning runs those after all other callbacks and this one has to run
    before `UpdateCheckpoint`. A resumed run knows the best weights that its checkpoint names. So the previous best
    weights stay until a second checkpoint that names newer ones has begun: the first of them is complete then.

    Args:
        monitor: name of the validated metric.
        mode: whether a larger (`max`) or a smaller (`min`) value is better.

    Raises:
        ValueError: another mode.
    """

    def __init__(self, monitor: str = "val/accuracy", mode: Literal["max", "min"] = "max") -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode={mode!r} was given; max and min are allowed.")
        self.monitor, self.mode = monitor, mode
        self.best_score: float | None = None
        self._folder = Path()
        self._name = self._name_in_last_save = ""

    @property
    def best_model_path(self) -> str:
        """The file of the best weights so far; empty before the first validation."""
        return str(self._folder / self._name) if self._name else ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, next to that of the checkpoints to resume from."""
        self._folder = Path(trainer.default_root_dir) / "best"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the weights if they are the best so far.

        Raises:
            ValueError: a validation that did not log the metric.
        """
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.monitor not in trainer.callback_metrics:
            known = sorted(trainer.callback_metrics)
            raise ValueError(f"BestCheckpoint monitors {self.monitor!r}, which was not logged; logged were {known}.")
        score = float(trainer.callback_metrics[self.monitor])
        if trainer.strategy.reduce_boolean_decision(self._is_better(score)):
            name = f"step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(self._folder / name, weights_only=True)
            self.best_score, self._name = score, name

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remove the weights that neither the checkpoint about to be written nor the one before it names."""
        for path in sorted(self._folder.glob("*.ckpt")) if trainer.is_global_zero else []:
            if path.name not in (self._name, self._name_in_last_save):
                trainer.strategy.remove_checkpoint(path)
        self._name_in_last_save = self._name

    def state_dict(self) -> dict[str, Any]:
        """Return the best so far, by file name, because the run folder may move."""
        return {"score": self.best_score, "name": self._name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the best weights that the checkpoint names."""
        self.best_score = state_dict["score"]
        self._name = self._name_in_last_save = state_dict["name"]

    def _is_better(self, score: float) -> bool:
        if math.isnan(score):
            return False
        if self.best_score is None:
            return True
        return score > self.best_score if self.mode == "max" else score < self.best_score
