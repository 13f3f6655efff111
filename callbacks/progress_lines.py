"""Prints how far training is, one line in N updates: in a terminal above the progress bar, and in any log.

    update 40 of 120 | reward 0.612 | low 8.1 tokens, 53.1 % right | high 22.4 tokens, 70.3 % right | unfinished 1.6 %,
    looping 0.0 % | 1:23 left

Shows what the run logs, of the last update that logged it (docs/metrics.md), and only what is there: reward or loss,
tokens and share of right answers by effort, shares of unfinished and looping completions, the last validation. The time
left is that of the updates, at the mean pace since this attempt began. Writes to stderr, from the first process.
"""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lit_puzzle.environments.environment import LEVELS

NUMBERS = {
    "reward": "train/reward",
    "loss": "train/loss",
    "divergence": "train/divergence",
    "validated loss": "val/loss",
    "validated accuracy": "val/accuracy",
}
SHARES = {"unfinished": "train/unfinished", "looping": "train/looping"}


class ProgressLines(Callback):
    """Prints a line in every so many updates.

    Args:
        every_updates: updates from one line to the next; the last update has one, too.

    Raises:
        ValueError: fewer than 1 update.
    """

    def __init__(self, every_updates: int = 10) -> None:
        if every_updates < 1:
            raise ValueError(f"every_updates {every_updates} was given; it must be at least 1.")
        self.every_updates = every_updates
        self._begun, self._first, self._told = 0.0, 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count time and updates."""
        self._begun, self._first = time.monotonic(), trainer.global_step
        self._told = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line, if one is due."""
        update, total = trainer.global_step, trainer.estimated_stepping_batches
        is_due = update > self._told and (update % self.every_updates == 0 or update == total)
        if not is_due or not trainer.is_global_zero:
            return
        self._told = update
        pace = (time.monotonic() - self._begun) / (update - self._first)
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        print(progress_line(update, total, numbers, pace), file=sys.stderr, flush=True)


def progress_line(update: int, total: float, numbers: Mapping[str, float], seconds: float) -> str:
    """Return the line.

    Args:
        update: number of the update, counted from 1.
        total: number of updates; infinite if it is not known.
        numbers: logged metrics.
        seconds: that an update takes.
    """
    parts = [f"update {update}" + (f" of {total}" if math.isfinite(total) else "")]
    shown = [name for name in NUMBERS if NUMBERS[name] in numbers]
    if "reward" in shown:  # a policy loss says nothing
        shown.remove("loss")
    parts += [f"{name} {numbers[NUMBERS[name]]:.4g}" for name in shown]
    for effort in LEVELS:
        if f"train/tokens/{effort}" in numbers:
            right = numbers.get(f"train/accuracy/{effort}")
            parts.append(f"{effort} {numbers[f'train/tokens/{effort}']:,.1f} tokens")
            parts[-1] += "" if right is None else f", {right:.1%} right".replace("%", " %")
    shares = [f"{name} {numbers[key]:.1%}".replace("%", " %") for name, key in SHARES.items() if key in numbers]
    parts += [", ".join(shares)] if shares else []
    if math.isfinite(total):
        parts.append(f"{duration(seconds * (total - update))} left")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """Return seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
