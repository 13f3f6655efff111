"""The difference between an engine's log-probabilities and the policy's: by hand, over processes, and its bound."""

import math

import pytest
import torch

from lit_puzzle.generation.engine import EngineFailedError
from lit_puzzle.generation.mismatch import mismatch_of, sums


def test_a_case_by_hand():
    policy = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -3.0, -4.0]])
    engine = torch.tensor([[-1.5, -2.0, -1.0], [-0.5, -2.0, -4.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = mismatch_of(sums(policy, engine, mask)[None])
    assert found.tokens == 5 and found.largest == 1.0
    assert found.mean == pytest.approx((0.5 + 0 + 0 + 1.0 + 0) / 5)
    assert found.kl == pytest.approx(((math.exp(0.5) - 1.5) + (math.exp(-1) - 1 + 1)) / 5)


def test_processes_are_weighted_by_their_tokens():
    torch.manual_seed(0)
    policy, engine = torch.randn(6, 4), torch.randn(6, 4)
    mask = torch.rand(6, 4) > 0.3
    whole = mismatch_of(sums(policy, engine, mask)[None])
    parts = [sums(policy[rows], engine[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 6))]
    split = mismatch_of(torch.stack(parts))
    assert (split.tokens, split.largest) == (whole.tokens, whole.largest)
    assert split.mean == pytest.approx(whole.mean) and split.kl == pytest.approx(whole.kl)


def test_the_kl_estimate_is_unbiased():
    torch.manual_seed(1)
    engine, policy = torch.randn(50).log_softmax(-1).double(), torch.randn(50).log_softmax(-1).double()
    drawn = torch.multinomial(engine.exp(), 200_000, replacement=True)
    found = mismatch_of(sums(policy[drawn], engine[drawn], torch.ones_like(drawn))[None])
    assert found.kl == pytest.approx(float((engine.exp() * (engine - policy)).sum()), rel=0.02)


def test_the_bound():
    ones = torch.ones(1, 4)
    agreeing = mismatch_of(sums(ones, ones + 0.009, ones)[None])
    agreeing.check(0.01, 3)
    with pytest.raises(EngineFailedError, match=r"rollout of update 3: mean .* 0\.009.*max_mismatch allows 0\.001"):
        agreeing.check(0.001, 3)
    with pytest.raises(EngineFailedError, match="nan"):
        mismatch_of(sums(ones, ones * math.nan, ones)[None]).check(1e9, 3)
    mismatch_of(sums(ones, ones * math.nan, ones * 0)[None]).check(0.01, 3)  # nothing to compare
