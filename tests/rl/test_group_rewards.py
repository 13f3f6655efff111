"""Rewards of whole groups in the engine: advantages by formula, from token ids alone, in one and two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recovery_runs import forked, make_child, make_data, make_module, make_trainer
from torch import Tensor

from lit_puzzle.rl.length_settings import GroupLengthSettings
from lit_puzzle.rl.settings import ExtraReward, GRPOLossSettings, GRPOSettings, RewardSettings, RolloutSampling

WEIGHT = 0.5


def even_end(*, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A grade that a random policy gets half of the time."""
    return [float(ids[-1] % 2 == 0) for ids in completion_ids]


def grpo(aggregation: Any, generations: int, processes: int) -> GRPOSettings:
    return GRPOSettings(
        num_generations=generations,
        completions_per_device=8 // processes // 2,
        sampling=RolloutSampling(max_new_tokens=6),
        loss=GRPOLossSettings(loss_type="grpo", aggregation=aggregation, scale_rewards="none"),
    )


def rollout(child: Path, folder: Path, settings: GRPOSettings, processes: int, rank: int) -> None:
    """Run one update, and write what the engine made of its completions."""
    rewards = RewardSettings(correctness=0.0, finished=0.0, group_length=GroupLengthSettings(WEIGHT, right_only=False))
    module = make_module(child, grpo=settings, rewards=rewards, extra_rewards=[ExtraReward(even_end)])

    def keep() -> None:
        engine: Any = module.engine
        parts = engine._trainer._buffered_inputs
        found = {name: [row for part in parts for row in part[name].tolist()] for name in PARTS}
        torch.save(found, folder / f"{rank}.pt")

    module.on_train_end = keep  # type: ignore[method-assign]
    trainer = make_trainer(folder, processes, 1, [])
    module.on_fit_end = lambda: None  # type: ignore[method-assign]
    trainer.fit(module, datamodule=make_data())


PARTS = ("prompt_ids", "completion_ids", "completion_mask", "advantages")


def expected_advantages(found: dict[str, list[Any]], settings: GRPOSettings) -> list[float]:
    """Advantages from token ids, written a second time."""
    ids = [
        [token for token, kept in zip(row, mask, strict=True) if kept]
        for row, mask in zip(found["completion_ids"], found["completion_mask"], strict=True)
    ]
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(found["prompt_ids"]):
        groups.setdefault(tuple(token for token in prompt if token), []).append(row)
    assert {len(rows) for rows in groups.values()} == {settings.num_generations}
    total = torch.zeros(len(ids))
    for rows in groups.values():
        lengths = torch.tensor([float(len(ids[row])) for row in rows])
        spread = lengths.max() - lengths.min()
        w = 1 - (lengths - lengths.min()) / spread if spread > 0 else torch.zeros(len(rows))
        grades = torch.tensor(even_end(completion_ids=[ids[row] for row in rows]))
        total[rows] = sum_of([(w - w.mean(), WEIGHT), (grades, 1.0)], settings.loss.aggregation)
    if settings.loss.aggregation == "normalize_then_sum":
        total = (total - total.mean()) / (total.std() + 1e-4)
    return total.tolist()


def sum_of(rewards: list[tuple[Tensor, float]], aggregation: str) -> Tensor:
    """Weighted sum over the rewards of a group: of centered ones, which are divided by their spread if wanted."""
    total = torch.zeros(len(rewards[0][0]))
    for values, weight in rewards:
        scale = values.std() + 1e-4 if aggregation == "normalize_then_sum" else torch.tensor(1.0)
        total += weight * (values - values.mean()) / scale
    return total


@pytest.mark.parametrize(
    ("aggregation", "generations", "processes"),
    [
        ("sum_then_normalize", 4, 1),
        ("normalize_then_sum", 4, 1),
        pytest.param("sum_then_normalize", 8, 2, marks=pytest.mark.slow),
    ],
)
def test_advantages_by_formula(
    tiny_config: Any, tmp_path: Path, aggregation: str, generations: int, processes: int
) -> None:
    """Each of two processes has half of the only group."""
    child = make_child(tmp_path / "child", tiny_config(num_hidden_layers=2), experts=(4, 2))
    settings = grpo(aggregation, generations, processes)
    assert forked(processes, lambda rank: rollout(child, tmp_path, settings, processes, rank)) == [0] * processes
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    found = {name: [row for part in parts for row in part[name]] for name in PARTS}
    expected = expected_advantages(found, settings)
    assert len(expected) == 8 and found["advantages"] == pytest.approx(expected, abs=1e-5)
    assert max(abs(value) for value in expected) > 0.1
