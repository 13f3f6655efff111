"""Prompts of rollouts: the same whatever the processes and batches, and continued where a run stopped."""

import pytest

from lit_puzzle.data.rollout_prompts import RolloutBatches
from lit_puzzle.environments.environment import draw
from lit_puzzle.tiny.world import Chains

PAIRS = draw([Chains()], {"low": 1.0, "high": 1.0}, 26, 0, held_out=False)


def numbered(loader: RolloutBatches, rounds: int = 2) -> list[list[tuple[int, str]]]:
    """The rows and questions of each batch that is trained on."""
    found = []
    for _ in range(rounds):
        for prompts in loader:
            own = list(zip(prompts.rows, [problem.question() for problem, _ in prompts.pairs], strict=True))
            found.append(own[prompts.span])
    return found


@pytest.mark.parametrize(("batch_size", "batches", "processes"), [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2)])
def test_rollouts_depend_neither_on_processes_nor_on_batches(batch_size, batches, processes):
    whole = numbered(RolloutBatches(PAIRS, 8, 1, 0, 1, seed=5))
    assert len(whole) == 6 and [row for batch in whole for row, _ in batch] == list(range(48))
    ranks = [numbered(RolloutBatches(PAIRS, batch_size, batches, r, processes, seed=5)) for r in range(processes)]
    together = [[pair for rank in ranks for pair in rank[i]] for i in range(len(ranks[0]))]
    rollouts = [together[i : i + batches] for i in range(0, len(together), batches)]
    assert [[pair for part in rollout for pair in part] for rollout in rollouts] == whole


def test_epochs_are_shuffled_anew_by_the_seed():
    first, second = (numbered(RolloutBatches(PAIRS, 8, 1, 0, 1, seed)) for seed in (5, 6))
    assert [text for _, text in first[0]] != [text for _, text in first[3]]
    assert first[0] != second[0]


def test_it_continues_where_it_stopped():
    whole = numbered(RolloutBatches(PAIRS, 4, 2, 0, 1, seed=5))
    begun = RolloutBatches(PAIRS, 4, 2, 0, 1, seed=5)
    batches = iter(begun)
    for _ in range(3):
        next(batches)
    resumed = RolloutBatches(PAIRS, 4, 2, 0, 1, seed=5)
    resumed.load_state_dict(begun.state_dict())
    assert numbered(resumed) == whole[3:]
    with pytest.raises(ValueError, match="8 completions in 2 batches; now they are 8 in 1"):
        RolloutBatches(PAIRS, 8, 1, 0, 1, seed=5).load_state_dict(begun.state_dict())


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match=r"26 training prompts were given; .* needs 32"):
        RolloutBatches(PAIRS, 8, 2, 0, 2, seed=0)
    with pytest.raises(ValueError, match=r"An epoch of 3 batches does not contain whole updates .*=2.*multiple"):
        RolloutBatches(PAIRS, 8, 1, 0, 1, seed=0).check_updates(2)
