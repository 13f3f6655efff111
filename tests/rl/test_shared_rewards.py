"""shared_rewards.py: shortness within a group and budgets of the mean, by hand."""

import pytest
import torch
from torch import Tensor

from lit_puzzle.rl.length_rewards import Budget, Overlong
from lit_puzzle.rl.shared_rewards import GroupLength, complete, counted_share, relative_shortness


def shortness(tokens: list[float], grades: list[float], right_only: bool = True) -> list[float]:
    row: Tensor = GroupLength(right_only).within_groups(torch.tensor([tokens]).float(), torch.tensor([grades]))[0]
    return row.tolist()


def test_by_hand() -> None:
    """Right ones of 10, 20 and 40 tokens: w = 1, 2/3, 0 with mean 5/9."""
    expected = pytest.approx([1 - 5 / 9, 0.0, 2 / 3 - 5 / 9, -5 / 9])
    assert shortness([10, 5, 20, 40], [1, 0, 1, 1]) == expected
    assert shortness([10, 20, 40, 25], [0, 0.5, 1, 1]) == pytest.approx([0, 0, -0.5, 0.5])
    assert shortness([1, 2, 3, 5], [0, 0, 0, 1], right_only=False) == pytest.approx(
        [1 - 0.5625, 0.75 - 0.5625, 0.5 - 0.5625, -0.5625]
    )


@pytest.mark.parametrize("grades", [[0, 0, 0], [0, 1, 0]])
def test_nothing_where_fewer_than_two_are_compared(grades: list[float]) -> None:
    assert shortness([3, 4, 5], grades) == [0.0, 0.0, 0.0]


def test_nothing_where_all_are_equally_long() -> None:
    assert shortness([7, 7, 9], [1, 1, 0]) == [0.0, 0.0, 0.0]


def test_sums_to_zero_and_stays_within_one() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens_PG = torch.randint(1, 100, (64, 8), generator=generator).float()
    compared_PG = torch.rand(64, 8, generator=generator) < 0.6
    found_PG = relative_shortness(tokens_PG, compared_PG)
    assert found_PG.isfinite().all() and (found_PG.abs() < 1).all()
    torch.testing.assert_close(found_PG.sum(1), torch.zeros(64), atol=1e-5, rtol=0)
    assert (found_PG[~compared_PG] == 0).all()
    order = tokens_PG[:, :, None] < tokens_PG[:, None, :]
    both = compared_PG[:, :, None] & compared_PG[:, None, :]
    assert (found_PG[:, :, None] > found_PG[:, None, :])[order & both].all()


def test_budgets_of_the_mean_by_hand() -> None:
    """Low effort has mean 6, halfway between its budget 4 and the full mean 8; medium is below, high beyond."""
    budget = Budget(
        start_tokens={"low": 4.0, "medium": 20.0, "high": 10.0},
        end_tokens={"low": 12.0, "medium": 40.0, "high": 20.0},
        full_mean_tokens={"low": 8.0, "medium": 22.0, "high": 11.0},
    )
    tokens_N, levels_N = torch.tensor([2, 30, 10, 12, 10, 12]), torch.tensor([0, 1, 0, 2, 1, 2])
    assert counted_share(budget, tokens_N, levels_N).tolist() == [0.5, 0.0, 0.5, 1.0, 0.0, 1.0]
    efforts = ["low", "medium", "low", "high", "medium", "high"]
    own = budget(completion_ids=[[0] * n for n in tokens_N.tolist()], effort=efforts)
    assert own == [0.0, -0.5, -0.75, -0.2, 0.0, -0.2]
    rewards_NF = torch.tensor([[1.0] * 6, own]).T.contiguous()
    complete([Overlong(96, 16), budget], rewards_NF, tokens_N, levels_N, group=2)
    torch.testing.assert_close(rewards_NF[:, 1], torch.tensor([0.0, 0.0, -0.375, -0.2, 0.0, -0.2]))
    assert rewards_NF[:, 0].tolist() == [1.0] * 6


def test_only_rewards_that_compare_are_changed() -> None:
    always = Budget({"low": 1.0}, {"low": 2.0})
    rewards_NF = torch.tensor([[1.0, -1.0, 4.0], [1.0, -0.5, 2.0]])
    complete([Overlong(96, 16), always, GroupLength()], rewards_NF, torch.tensor([4, 2]), torch.tensor([0, 0]), 2)
    assert rewards_NF.tolist() == [[1.0, -1.0, -0.5], [1.0, -0.5, 0.5]]
