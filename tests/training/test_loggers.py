"""loggers.py: killed and resumed, each logger shows the steps of an uninterrupted run once, with the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recovery_runs import forked, kill_self
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lit_puzzle.training import loggers
from lit_puzzle.training.checkpoints import UpdateCheckpoint
from lit_puzzle.training.lightning import sound_checkpoint
from lit_puzzle.training.loggers import CSV, TensorBoard, WandB
from lit_puzzle.training.metrics_file import MetricsFile

STEPS = 11
LOGGERS = {"csv": CSV, "tensorboard": TensorBoard, "wandb": WandB}


class Model(LightningModule):
    """Logs a loss in every update and another metric in every validation; `on_step` may kill it."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.on_step = on_step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.on_step(self.global_step)
        loss = self.weight.pow(2).sum()
        if self.global_step % 3 == 0:
            self.log("train/sometimes", loss * 2)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/weight", self.weight)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Dying(UpdateCheckpoint):
    """Is killed right after the checkpoint of an update was written, before Lightning logs the update."""

    def __init__(self, at: int) -> None:
        super().__init__(every_n_updates=2)
        self.at = at

    def _save(self, trainer: Trainer) -> None:
        super()._save(trainer)
        if trainer.global_step == self.at:
            kill_self()


def fit(folder: Path, name: str, at: int = -1, after_checkpoint: int = -1) -> None:
    """One attempt; batches of an epoch of 100, validation after every fourth update."""

    def on_step(step: int) -> None:
        if step == at:
            kill_self()

    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        default_root_dir=folder,
        logger=LOGGERS[name](folder),
        log_every_n_steps=1,
        val_check_interval=4,
        num_sanity_val_steps=0,
        callbacks=[Dying(after_checkpoint)],
        **settings,
    )
    train: Any = torch.zeros(100, 1)
    trainer.fit(Model(on_step), DataLoader(train), DataLoader(train[:1]), ckpt_path=sound_checkpoint(folder))


def in_csv(folder: Path) -> list[tuple[int, str, float]]:
    rows = MetricsFile(folder / "logs" / "metrics.csv").rows()
    return [(step, name, value) for step, metrics in rows for name, value in metrics.items()]


def in_tensorboard(folder: Path) -> list[tuple[int, str, float]]:
    """Every value in the event files, without what TensorBoard itself would leave out."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted((folder / "logs" / "tensorboard").iterdir())
    events = [event for file in files for event in EventFileLoader(str(file)).Load()]
    return [
        (event.step, value.tag, value.tensor.float_val[0])
        for event in events
        if event.HasField("summary")
        for value in event.summary.value
    ]


def in_wandb(folder: Path) -> list[tuple[int, str, float]]:
    """Every value in the files of offline runs that `wandb sync` reads."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in (folder / "logs" / "wandb").glob("offline-run-*/*.wandb"):
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
                step = values.pop("trainer/global_step")
                found += [(step, name, value) for name, value in values.items() if not name.startswith("_")]
    return found


def log_records(raw: bytes) -> list[bytes]:
    """Records in LevelDB's log format: checksum (4 bytes), length (2), kind (1) and data, in blocks of 32 KiB."""
    block, place, records, begun = 32768, 7, list[bytes](), b""  # 7 bytes of W&B's own first
    while place + 7 <= len(raw):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        begun += raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(begun)
            begun = b""
    return records


READERS = {"csv": in_csv, "tensorboard": in_tensorboard, "wandb": in_wandb}


@pytest.mark.parametrize("name", LOGGERS)
@pytest.mark.slow
def test_a_killed_run_logs_every_step_once(tmp_path: Path, name: str) -> None:
    """Killed at an update, after a checkpoint whose update is not logged yet, and after one with a validation."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert forked(1, lambda _: fit(whole, name)) == [0]
    assert forked(1, lambda _: fit(killed, name, at=5)) == [-9]
    assert forked(1, lambda _: fit(killed, name, after_checkpoint=6)) == [-9]
    assert forked(1, lambda _: fit(killed, name, after_checkpoint=8)) == [-9]
    assert forked(1, lambda _: fit(killed, name)) == [0]
    read = READERS[name]
    expected = read(whole)
    assert [step for step, key, _ in expected if key == "train/loss"] == list(range(STEPS))
    assert [step for step, key, _ in expected if key == "train/sometimes"] == [0, 3, 6, 9]
    assert [step for step, key, _ in expected if key == "val/weight"] == [3, 7]
    assert len(expected) == len({(step, key) for step, key, _ in expected})
    assert sorted(read(killed)) == sorted(expected)
    assert in_csv(killed) == in_csv(whole)


@pytest.mark.slow
def test_a_run_may_change_its_logger(tmp_path: Path) -> None:
    """What was logged before is there, too."""
    assert forked(1, lambda _: fit(tmp_path / "run", "csv", at=9)) == [-9]
    assert forked(1, lambda _: fit(tmp_path / "run", "tensorboard")) == [0]
    losses = [step for step, key, _ in in_tensorboard(tmp_path / "run") if key == "train/loss"]
    assert losses == list(range(STEPS))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    for logger in (TensorBoard, WandB):
        with pytest.raises(ValueError, match=rf"{logger.__name__} needs the package .*lit-puzzle\[loggers\]"):
            logger(tmp_path)
