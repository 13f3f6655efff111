"""Quality loss of a token: plain float64 formulas, hand-computed cases, chunks that change nothing, bounded memory."""

import math
from functools import partial

import pytest
import torch
from helpers.live_bytes import LiveBytes
from helpers.token_losses import token_losses

from lit_puzzle.scoring.block_quality import (
    METRICS,
    NO_TOKEN,
    ScoredTokens,
    hidden_quality_loss,
    logit_quality_loss,
    quality_loss_sums,
    token_counts,
)


def random_case(scale: float, tokens: int = 37, vocabulary: int = 50, channels: int = 12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    parent = torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    child = parent + scale * torch.randn(tokens, channels, generator=generator, dtype=torch.float64)
    head = 2 * torch.randn(vocabulary, channels, generator=generator, dtype=torch.float64)
    samples = torch.randint(4, (tokens,), generator=generator)
    targets = torch.randint(-1, vocabulary, (tokens,), generator=generator)
    return parent.to(dtype), child.to(dtype), head.to(dtype), samples, targets


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_the_plain_formulas(scale, dtype):
    parent, child, head, samples, targets = random_case(scale, dtype=dtype)
    expected = torch.zeros(5, len(METRICS), dtype=torch.float64)
    expected.index_add_(0, samples, token_losses(parent, child, head, targets))
    tokens = ScoredTokens(samples, targets, parent)
    found = quality_loss_sums(tokens, child, lambda hidden: hidden @ head.T, num_samples=5, chunk_tokens=10)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    if dtype == torch.float32:  # log-probabilities reach -60
        close = partial(torch.testing.assert_close, rtol=2e-4, atol=3e-5)
    close(found, expected)
    assert (found[4] == 0).all()  # a sample without a token
    kept = ScoredTokens(samples, targets, parent, torch.log_softmax(parent @ head.T, -1))
    for given, size in ((tokens, 1), (tokens, 1000), (kept, 10)):
        again = quality_loss_sums(given, child, lambda hidden: hidden @ head.T, num_samples=5, chunk_tokens=size)
        close(again, found)


def test_hand_computed_token():
    parent, child = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    kl, js, increase, disagree = logit_quality_loss(parent, child, torch.tensor([0]))
    assert float(kl) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    entropy = lambda *p: -sum(x * math.log(x) for x in p)  # noqa: E731
    assert float(js) == pytest.approx(entropy(0.375, 0.625) - (entropy(0.5, 0.5) + entropy(0.25, 0.75)) / 2, abs=1e-6)
    assert float(increase) == pytest.approx(math.log(2), abs=1e-6)
    assert disagree.tolist() == [True]
    mse, cosine = hidden_quality_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    assert float(mse) == pytest.approx(2.5) and float(cosine) == pytest.approx(1.0)


def test_equal_sides_lose_nothing_and_certain_ones_stay_finite():
    parent, _, head, samples, targets = random_case(1.0)
    tokens = ScoredTokens(samples, targets, parent)
    assert (quality_loss_sums(tokens, parent, lambda hidden: 50 * hidden @ head.T, 4, 8) == 0).all()
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]])
    kl, js, increase, _ = logit_quality_loss(
        logits.log_softmax(-1), logits.flip(0).log_softmax(-1), torch.tensor([0, 1])
    )
    assert kl.tolist() == pytest.approx([200.0, 200.0]) and js.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-5)
    assert increase.tolist() == pytest.approx([200.0, 200.0])


def test_a_token_without_a_next_one_counts_for_all_but_the_loss():
    counts = token_counts(torch.tensor([0, 0, 1]), torch.tensor([5, NO_TOKEN, NO_TOKEN]), 2)
    loss = METRICS.index("lm_loss")
    assert counts[:, loss].tolist() == [1, 0]
    assert (counts[:, [i for i in range(len(METRICS)) if i != loss]] == torch.tensor([[2.0], [1.0]])).all()


@pytest.mark.parametrize("tokens", [64, 512])
def test_memory_is_that_of_a_chunk(tokens):
    chunk, vocabulary = 16, 4096
    parent, child, head, samples, targets = random_case(0.1, tokens, vocabulary)
    head = head.T.contiguous()
    with LiveBytes() as live:
        quality_loss_sums(ScoredTokens(samples, targets, parent), child, lambda hidden: hidden @ head, 4, chunk)
    formula = 7 * 4 * chunk * vocabulary
    assert 0.5 * formula < live.peak <= 1.02 * formula
