"""group_length.py: shortness within a group, by hand and as the engine puts it among the rewards."""

import pytest
import torch
from torch import Tensor

from lit_puzzle.rl.group_length import GroupLength, relative_shortness


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
