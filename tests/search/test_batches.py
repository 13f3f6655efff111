"""batches.py: ladders of batch sizes, and finer ones around a chosen size."""

import pytest

from lit_puzzle.costs.serving import Deployment
from lit_puzzle.search.batches import LADDER, finer, ladder

ONE, TWO = Deployment(1, 1, 8), Deployment(2, 1, 4)


@pytest.mark.parametrize(("lowest", "highest"), [(1, 1), (1, 5), (7, 256), (100, 111), (1, 1024)])
def test_a_ladder_has_both_ends_and_at_most_twelve_steps(lowest, highest):
    steps = ladder(lowest, highest)
    assert steps[0] == lowest and steps[-1] == highest and len(steps) <= LADDER
    assert steps == sorted(set(steps))
    if highest - lowest < LADDER:
        assert steps == list(range(lowest, highest + 1))


def test_no_batch_fits():
    assert ladder(1, 0) == []


def test_finer_by_hand():
    tried = [[(ONE, 4), (ONE, 8), (TWO, 10), (TWO, 20), (TWO, 40)], [(ONE, 3)]]
    # Around 20 in the same deployment: 10, 13, 16, 20, 25, 32, 40 (steps of a cube root of 2); 3 has no neighbors.
    assert finer(tried, (3, 0)) == [[(TWO, size) for size in (10, 13, 16, 20, 25, 32, 40)], [(ONE, 3)]]


def test_finer_ends_at_neighboring_whole_numbers():
    tried, rounds = [[(ONE, size) for size in ladder(3, 900)]], 0
    while (closer := finer(tried, (next(i for i, (_, s) in enumerate(tried[0]) if s >= 200),))) is not None:
        tried, rounds = closer, rounds + 1
    sizes = [size for _, size in tried[0]]
    assert 200 in sizes and {199, 201} <= set(sizes) and rounds < 8
