"""Plans from numbers: the best-scored experts are kept, windows are set, scores that cannot be used are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.released_twin import write_released_twin

from lit_puzzle.child.manual_plan import manual_plan
from lit_puzzle.child.settings import ManualPlan
from lit_puzzle.importance.importance_file import Importance
from lit_puzzle.model.checkpoint import Checkpoint, fingerprint


def save_importance(folder: Path, parent: Path, scores: list[list[float]]) -> Path:
    folder.mkdir()
    Importance(fingerprint(parent), "hand", 1, tuple(torch.tensor(row) for row in scores)).save(folder)
    return folder


def test_plan_from_importance_keeps_the_best_and_breaks_ties_downwards(tmp_path: Path, parent: Path) -> None:
    scores = [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0, 9, 0, 9, 0, 9, 0, 9]]
    importance = save_importance(tmp_path / "importance", parent, [[float(s) for s in row] for row in scores])
    plan = manual_plan(Checkpoint(parent), ManualPlan(importance, [3, 3, 3, 5], {3: 4}))
    assert plan.parent_fingerprint == fingerprint(parent) and plan.num_parent_experts == 8
    assert [block.experts for block in plan.blocks] == [(5, 6, 7), (0, 1, 2), (0, 1, 2), (0, 1, 3, 5, 7)]
    assert [block.window_tokens for block in plan.blocks] == [8, None, 8, 4]
    assert [block.num_experts for block in manual_plan(Checkpoint(parent), ManualPlan(importance, 4)).blocks] == [4] * 4


def test_the_default_is_the_parent_itself(parent: Path) -> None:
    plan = manual_plan(Checkpoint(parent), ManualPlan())
    assert [(block.experts, block.window_tokens) for block in plan.blocks] == [
        (tuple(range(8)), 8),
        (tuple(range(8)), None),
    ] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 4}, "experts is given without importance"),
        ({"importance": Path("scores")}, "importance is given without experts"),
    ],
)
def test_experts_and_importance_need_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ManualPlan(**settings)


def test_windows_of_unknown_layers_are_refused(parent: Path) -> None:
    with pytest.raises(ValueError, match=r"windows names layers \[4\]; the parent has layers 0\.\.3"):
        manual_plan(Checkpoint(parent), ManualPlan(windows={4: 8}))


@pytest.mark.parametrize(
    ("spoil", "experts", "message"),
    [
        (lambda scores: scores[2].__setitem__(0, float("nan")), 4, "scores of layer 2 are not all finite"),
        (lambda scores: None, 9, "9 experts cannot be kept of 8"),
        (lambda scores: None, [4, 4], "2 expert counts were given for 4 layers"),
        (lambda scores: None, 0, "0 experts cannot be kept"),
    ],
)
def test_bad_importance_is_refused(
    tmp_path: Path, parent: Path, spoil: Callable[[list[list[float]]], None], experts: Any, message: str
) -> None:
    scores = [[float(index) for index in range(8)] for _ in range(4)]
    spoil(scores)
    importance = save_importance(tmp_path / "importance", parent, scores)
    with pytest.raises(ValueError, match=message):
        manual_plan(Checkpoint(parent), ManualPlan(importance, experts))


def test_importance_of_another_parent_is_refused(tmp_path: Path, parent: Path) -> None:
    twin = write_released_twin(tmp_path / "twin")
    importance = save_importance(tmp_path / "importance", twin, [[float(index) for index in range(8)]] * 4)
    with pytest.raises(ValueError, match="importance scores are of parent"):
        manual_plan(Checkpoint(parent), ManualPlan(importance, 4))
