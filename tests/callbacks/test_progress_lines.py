"""progress_lines.py: what a line says, and on which updates a run prints one."""

from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lit_puzzle.callbacks.progress_lines import ProgressLines, duration, progress_line

RECOVERY = {
    "train/loss": 0.01,
    "train/reward": 0.61234,
    "train/tokens/low": 8.125,
    "train/accuracy/low": 0.53125,
    "train/tokens/high": 2210.0,
    "train/unfinished": 0.015625,
    "train/looping": 0.0,
    "val/accuracy": 0.578,
}


def test_a_line_says_what_was_logged() -> None:
    assert progress_line(40, 120, RECOVERY, seconds=2.0) == (
        "update 40 of 120 | reward 0.6123 | validated accuracy 0.578 | low 8.1 tokens, 53.1 % right | "
        "high 2,210.0 tokens | unfinished 1.6 %, looping 0.0 % | 2:40 left"
    )
    assert progress_line(7, float("inf"), {"train/loss": 0.25, "val/loss": 3.0}, 1.0) == (
        "update 7 | loss 0.25 | validated loss 3"
    )
    assert [duration(seconds) for seconds in (0.2, 59.6, 3599, 3600, 90000)] == [
        *("0:00", "1:00", "59:59", "1:00:00", "25:00:00")
    ]


class Model(LightningModule):
    """Two batches for an update."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("train/loss", self.weight.sum())
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.25)


def test_a_line_in_three_updates_and_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=7,
        accumulate_grad_batches=2,
        default_root_dir=tmp_path,
        logger=False,
        callbacks=[ProgressLines(every_updates=3)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), DataLoader(torch.zeros(40, 1)))  # type: ignore[arg-type]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("update ")]
    starts = ["update 3 of 7 | loss 0.5 | 0:00", "update 6 of 7 | loss -0.25 |", "update 7 of 7 | loss -0.5 | 0:00"]
    assert len(lines) == 3 and all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines


def test_a_number_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every_updates 0 was given; it must be at least 1"):
        ProgressLines(0)
