"""Runs stop when loss or weights are no longer finite, by the number of the update, and save nothing of it."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import distillation_runs, recovery_runs
from helpers.recovery_runs import checkpoints, forked, make_child, make_data, make_module, make_trainer

from lit_puzzle.rl.settings import ExtraReward
from lit_puzzle.training.finite import check_loss, largest_weight, raise_together


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_weight_is_found_among_those_that_train(bad: float) -> None:
    first, second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
    model = torch.nn.Sequential(first, second)
    second.weight.data.fill_(-7.0)
    assert largest_weight(model) == 7.0
    first.bias.data[2] = bad
    assert not largest_weight(model) < math.inf
    first.requires_grad_(False)
    assert largest_weight(model) == 7.0


def test_the_first_reason_is_raised() -> None:
    raise_together(None)
    with pytest.raises(ValueError, match="broken"):
        raise_together("broken")
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(reduce_boolean_decision=bool), global_step=4)
    check_loss(trainer, torch.tensor(3.0))
    with pytest.raises(ValueError, match="The loss is nan at update 5"):
        check_loss(trainer, torch.tensor(math.nan))


def far_too_fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e38)


@pytest.mark.slow
def test_recovery_stops_at_the_update_and_keeps_earlier_checkpoints(tiny_config: Any, tmp_path: Path) -> None:
    child = make_child(tmp_path / "child", tiny_config(num_hidden_layers=2))

    def run(_: int) -> None:
        trainer = make_trainer(tmp_path / "run", 1, 6, [*checkpoints()], gradient_clip_val=None)
        module = make_module(child, extra_rewards=[ExtraReward(recovery_runs.many_even_tokens)], optimizer=far_too_fast)
        module.lr_scheduler = None
        try:
            trainer.fit(module, datamodule=make_data())
        except ValueError as error:
            (tmp_path / "said").write_text(str(error))

    assert forked(1, run) == [0]
    said = (tmp_path / "said").read_text()
    assert re.match(r"(The loss is (nan|inf|-inf) at|Weights are not finite after) update [12]\b.*Lower the lear", said)
    assert not (tmp_path / "run" / "child").exists()
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt")]
    assert saved in ([], ["step=1.ckpt"])  # finite weights after the first update, but no finite loss in the second
    assert saved == [] or "The loss is" in said


@pytest.mark.slow
def test_distillation_stops_at_the_update(tiny_config: Any, tmp_path: Path) -> None:
    models = distillation_runs.make_models(tmp_path, tiny_config)

    def run(_: int) -> None:
        try:
            distillation_runs.fit(tmp_path / "run", models, 6, optimizer=far_too_fast, lr_scheduler=None)
        except ValueError as error:
            (tmp_path / "said").write_text(json.dumps(str(error)))

    assert forked(1, run) == [0]
    said = json.loads((tmp_path / "said").read_text())
    assert re.match(r"(The loss is (nan|inf|-inf) at step 1|Weights are not finite after update 1)\b", said)
    assert not (tmp_path / "run" / "child").exists()
