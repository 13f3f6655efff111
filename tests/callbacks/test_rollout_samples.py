"""rollout_samples.py: which completions are written, with which grades; a resumed run writes the same file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lit_puzzle.callbacks.rollout_samples import RolloutSamples
from lit_puzzle.data.rl_prompts import PromptData
from lit_puzzle.environments.episodes import read_rows
from lit_puzzle.tiny.tokenizer import build_tokenizer
from lit_puzzle.tiny.world import Chains

TOKENIZER = build_tokenizer()
RIGHT = "<|channel|>final<|message|>7<|return|>"


class Policy(LightningModule):
    """Generates on every second step: a right, a wrong, an unanswered, a cut off and another right completion."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = TOKENIZER

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        outputs: dict[str, Any] = {"loss": self.weight.sum()}
        if self.global_step % 2 == 0:
            texts = [RIGHT, RIGHT.replace("7", "8"), "7<|return|>", "7", RIGHT]
            outputs |= {
                "completion_ids": [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts],
                "prompt": [f"step {self.global_step}"] * 5,
                "answer": ["7"] * 5,
                "truncated": torch.tensor([False, False, False, True, False]),
                "effort": ["high", "low", "low", "high", "low"],
                "environment": ["chains"] * 5,
                "rewards": {"correctness": [1.0, 0.0, 0.0, 0.0, 1.0], "length": [-0.5] * 5},
            }
        return outputs

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(PromptData):
    """Batches of nothing."""

    def __init__(self) -> None:
        super().__init__([Chains()], {"low": 1.0, "high": 1.0})

    def train_dataloader(self) -> Any:
        return DataLoader(torch.zeros(40, 1))  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return []


def train(folder: Path, steps: int, checkpoint: Path | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        callbacks=[RolloutSamples(every_rollouts=2, completions=4, show_every_rollouts=3), saving],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Policy(), datamodule=Data(), ckpt_path=checkpoint)
    return folder / "rollouts" / "episodes.jsonl"


def test_every_second_rollout_is_written_with_its_grades(tmp_path: Path) -> None:
    rows = read_rows(train(tmp_path, 12))
    assert [row.row for row in rows] == list(range(12))  # rollouts 0, 2 and 4, at steps 0, 4 and 8
    assert [row.texts.prompt for row in rows if row.texts] == [f"step {step}" for step in (0, 4, 8) for _ in range(4)]
    reasons = ["right", "wrong", "malformed", "cut off"]
    assert [(row.correct, row.verdict.reason) for row in rows[:4]] == [(float(why == "right"), why) for why in reasons]
    assert [row.looping for row in rows[:4]] == [False] * 4
    assert rows[0].texts is not None and rows[0].texts.completion == RIGHT and rows[0].texts.answer == "7"
    assert [row.finish for row in rows[:4]] == ["stop", "stop", "stop", "length"]
    assert rows[0].generated_tokens == len(TOKENIZER(RIGHT, add_special_tokens=False)["input_ids"])
    assert [row.verdict.rewards for row in rows[:2]] == [
        {"correctness": float(row.correct), "length": -0.5} for row in rows[:2]
    ]
    stored = set(json.loads((tmp_path / "rollouts" / "episodes.jsonl").read_text().splitlines()[0]))
    assert {"prompt", "completion", "rewards", "generated_tokens", "finish", "effort", "environment"} <= stored


def test_the_first_completion_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, 10)  # rollouts 0 to 4, of which 0 and 3 are shown
    said = capsys.readouterr().err
    assert said.count("--- a completion of update") == 2 and "update 7: chains, effort high" in said
    assert f"completion:\n    {RIGHT}\nanswer:\n    7\nright, " in said
    assert "finish stop | correctness 1 | length -0.5" in said


def test_a_resumed_run_writes_the_same_file(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 12).read_text()
    begun = train(tmp_path / "begun", 9)  # the newest checkpoint but one is of step 6: rows 8 to 11 come later
    with begun.open("a") as stream:
        stream.write('{"half a')
    assert train(tmp_path / "begun", 12, tmp_path / "begun" / "step=6.ckpt").read_text() == whole


def test_wrong_numbers_and_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="every_rollouts 0, completions 4, show_every_rollouts 40: each must be at least 1"
    ):
        RolloutSamples(every_rollouts=0)
    trainer = Trainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, logger=False, callbacks=[RolloutSamples()]
    )
    with pytest.raises(ValueError, match="RolloutSamples needs PromptData"):
        trainer.fit(Policy(), DataLoader(torch.zeros(4, 1)))  # type: ignore[arg-type]
