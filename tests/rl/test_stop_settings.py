"""stop_settings.py: a run whose KL or ratios run away stops with its state, and resumes with other limits."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.grpo_settings import change
from helpers.recovery_runs import (
    GRPO,
    Recorder,
    forked,
    losses,
    make_child,
    make_data,
    make_module,
    make_trainer,
    save_weights,
)

from lit_puzzle.rl.settings import ExtraReward
from lit_puzzle.rl.stop_settings import StopSettings
from lit_puzzle.run.stopped_training import TrainingStoppedError
from lit_puzzle.training.checkpoints import UpdateCheckpoint
from lit_puzzle.training.lightning import sound_checkpoint
from lit_puzzle.training.settings import LoraSettings, TrainingSettings

STEPS = 8


@pytest.mark.parametrize("value", [2.5, math.inf, math.nan])
def test_update_value_and_limit_are_named(value: float) -> None:
    limits = StopSettings(max_kl=2.0, max_clipped=0.5)
    limits.check({"kl": [9.0, 2.0], "clip_ratio/region_mean": [0.5], "entropy": [99.0]}, 1)
    limits.check({}, 1)
    said = rf"KL divergence .* is {value:.3g} at update 7; grpo\.stop\.max_kl allows 2\. .* resumes with a higher"
    with pytest.raises(TrainingStoppedError, match=said):
        limits.check({"kl": [0.1, value]}, 7)
    with pytest.raises(TrainingStoppedError, match=r"share of clipped tokens is 0\.6 .*max_clipped allows 0\.5"):
        limits.check({"clip_ratio/region_mean": [0.6]}, 7)
    StopSettings(max_kl=None).check({"kl": [value], "clip_ratio/region_mean": [1.0]}, 7)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_limit_is_a_positive_number(bad: float) -> None:
    with pytest.raises(ValueError, match=r"grpo\.stop\.max_clipped is .*null: no limit"):
        StopSettings(max_clipped=bad)


class Breaking:
    """One number too few in its second rollout, which the fifth update begins with; `mended`: right numbers."""

    def __init__(self, mended: bool) -> None:
        self.calls, self.mended, self.__name__ = 0, mended, "mine"

    def __call__(self, *, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        self.calls += 1
        values = [float(sum(ids) % 5) for ids in completion_ids]
        return values if self.mended or self.calls < 2 else values[:-1]


def fit(folder: Path, child: Path, rank: int, processes: int, stops: str | None) -> None:
    """Adapters whose KL grows; what stops the run is written down."""
    folder.mkdir(exist_ok=True)
    grpo = change(GRPO, beta=0.01, stop=StopSettings(max_kl=1e-4 if stops == "kl" else None))
    settings = {"training": TrainingSettings(lora=LoraSettings(rank=4))}
    module = make_module(child, grpo=grpo, extra_rewards=[ExtraReward(Breaking(stops != "reward"))], **settings)
    trainer = make_trainer(folder, processes, STEPS, [Recorder(folder, rank=rank), UpdateCheckpoint(3)])
    module.on_train_end = lambda: save_weights(module, folder)  # type: ignore[method-assign]
    try:
        trainer.fit(module, datamodule=make_data(prompts=16), ckpt_path=sound_checkpoint(folder))
    except TrainingStoppedError as error:
        (folder / f"said{rank}").write_text(str(error))


SAID = {"kl": "grpo.stop.max_kl allows 0.0001. The state", "reward": "The reward 'mine' returned list of length "}


@pytest.mark.parametrize(("stops", "processes"), [("kl", 1), ("kl", 2), ("reward", 1)])
@pytest.mark.slow
def test_a_stopped_run_resumes_bit_for_bit(tiny_config: Any, tmp_path: Path, stops: str, processes: int) -> None:
    """Stopped before an update that no checkpoint was due before; then the limit is lifted, or the reward mended."""
    child = make_child(tmp_path / "child", tiny_config(num_hidden_layers=2))

    def run(name: str, stops: str | None) -> list[int | None]:
        return forked(processes, lambda rank: fit(tmp_path / name, child, rank, processes, stops))

    assert run("whole", None) == [0] * processes
    assert run("stopped", stops) == [0] * processes
    said = {(tmp_path / "stopped" / f"said{rank}").read_text() for rank in range(processes)}
    assert len(said) == 1 and SAID[stops] in said.pop()
    newest = sound_checkpoint(tmp_path / "stopped")
    assert newest is not None and newest.name not in ("step=3.ckpt", "step=6.ckpt")
    assert run("stopped", None) == [0] * processes
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    ours, theirs = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("stopped", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
