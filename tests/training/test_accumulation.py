"""The last, incomplete update of an epoch is the mean over its own batches, as its gradient shows."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.distillation_runs import Models, fit, make_models
from helpers.recovery_runs import forked
from lightning.pytorch import Callback

from lit_puzzle.training.accumulation import batch_weight


def trainer(accumulated: int, batches: float) -> Any:
    return SimpleNamespace(accumulate_grad_batches=accumulated, num_training_batches=batches)


@pytest.mark.parametrize(
    ("accumulated", "batches", "weights"),
    [
        (1, 5, [1.0] * 5),
        (1, math.inf, [1.0] * 3),
        (4, 8, [1.0] * 8),
        (4, 10, [1.0] * 8 + [2.0] * 2),
        (64, 13, [64 / 13] * 13),
        (2, 1, [2.0]),
    ],
)
def test_weights_of_an_epoch(accumulated: int, batches: float, weights: list[float]) -> None:
    found = [batch_weight(trainer(accumulated, batches), index) for index in range(len(weights))]
    assert found == weights
    if batches < math.inf:  # each update divides by what Lightning divides by: the mean of its batches
        for begin in range(0, len(weights), accumulated):
            assert sum(found[begin : begin + accumulated]) / accumulated == pytest.approx(1.0)


def test_data_of_unknown_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2 was given with data of unknown length"):
        batch_weight(trainer(2, math.inf), 0)


class Gradients(Callback):
    """Keeps the gradient of every update, before it is clipped."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []
        self.batches = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.batches = int(trainer.num_training_batches)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.kept.append(torch.cat(grads).clone())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_config: Any) -> Models:
    return make_models(tmp_path_factory.mktemp("kd"), tiny_config)


def gradients(folder: Path, models: Models, accumulated: int, updates: int) -> Gradients:
    """Gradients of a distillation whose weights do not move."""
    watch = Gradients()
    still: dict[str, Any] = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "lr_scheduler": None}
    settings = {"accumulate_grad_batches": accumulated, "val_check_interval": 1000, "check_val_every_n_epoch": None}
    torch.manual_seed(0)
    fit(folder, models, updates, callbacks=[watch], trainer=settings, data={"validation_one_in": 0}, **still)
    return watch


@pytest.mark.slow
def test_an_incomplete_update_has_the_gradient_of_a_whole_one(models: Models, tmp_path: Path) -> None:
    def compare(_: int) -> None:
        alone = gradients(tmp_path / "1", models, 1, 19)
        batches = alone.batches
        assert batches == len(alone.kept) == 19
        all_at_once = gradients(tmp_path / "64", models, 64, 1)
        by_four = gradients(tmp_path / "4", models, 4, math.ceil(batches / 4))
        epoch = torch.stack(alone.kept[:batches])
        torch.testing.assert_close(all_at_once.kept[0], epoch.mean(0), rtol=1e-4, atol=1e-7)
        last = epoch[batches // 4 * 4 :]
        torch.testing.assert_close(by_four.kept[-1], last.mean(0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(by_four.kept[0], epoch[:4].mean(0), rtol=1e-4, atol=1e-7)
        (tmp_path / "compared").touch()

    assert forked(1, compare) == [0] and (tmp_path / "compared").is_file()
