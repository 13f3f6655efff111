"""Completions as one packed batch."""

import torch

from lit_puzzle.data.packed_rows import packed_completions
from lit_puzzle.generation.engine import Completion


def test_prompts_and_completions_lie_behind_one_another():
    completions = [Completion([4, 5, 6], "length"), Completion([9], "stop"), Completion([11, 2], "stop")]
    batch = packed_completions([[3, 7], [8], [10, 10, 10]], completions)
    assert batch["input_ids"].tolist() == [[3, 7, 4, 5, 6], [8, 9, 0, 0, 0], [10, 10, 10, 11, 2]]
    assert batch["loss_mask"].long().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert batch["document_ids"].tolist() == [[0] * 5, [1, 1, -1, -1, -1], [2] * 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert "logprobs" not in batch


def test_short_ones_share_a_row_and_log_probabilities_lie_at_their_tokens():
    completions = [
        Completion([4], "stop", [-0.5]),
        Completion([2], "stop", [-1.5]),
        Completion([5] * 4, "stop", [-2.0] * 4),
    ]
    batch = packed_completions([[3], [7], [9]], completions)
    assert batch["input_ids"].tolist() == [[3, 4, 7, 2, 0], [9, 5, 5, 5, 5]]
    assert batch["position_ids"][0].tolist() == [0, 1, 0, 1, 0]
    torch.testing.assert_close(batch["logprobs"], torch.tensor([[0, -0.5, 0, -1.5, 0], [0, -2.0, -2.0, -2.0, -2.0]]))
