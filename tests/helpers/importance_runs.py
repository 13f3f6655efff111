"""Importance of a small parent on five sequences, as both of its passes are tested: a run, and its inputs."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

from lit_puzzle.data.calibration import CalibrationData
from lit_puzzle.importance.importance import ExpertImportance


def write_sequences(file: Path) -> Path:
    """Five sequences of different lengths: three batches of two, one for the second of two processes to go without."""
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in (21, 5, 13, 8, 16)]
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return file


def run_importance(folder: Path, parent: Path, sequences: Path, **options: Any) -> ExpertImportance:
    folder.mkdir(exist_ok=True)
    module = ExpertImportance(parent, **options)
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.validate(module, CalibrationData(parent, sequences=sequences, batch_size=2), verbose=False)
    return module
