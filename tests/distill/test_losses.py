"""Distillation losses against a second implementation of the formulas, TRL's kernel, and numbers by hand; memory."""

import math

import pytest
import torch
from helpers.live_bytes import LiveBytes
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from lit_puzzle.distill import losses
from lit_puzzle.distill.losses import FullLogits, TopKLogits, divergence, head_loss, hidden_distance
from lit_puzzle.distill.settings import DivergenceName, LossSettings

KINDS: list[DivergenceName] = ["forward_kl", "reverse_kl", "kl_mix", "jsd"]


def inputs(tokens: int = 23, vocabulary: int = 50, channels: int = 12) -> tuple[Tensor, Tensor, FullLogits, Tensor]:
    """Float64 states and head of a child, those of a parent of another width, and the targets."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    parent = FullLogits(draw(tokens, channels + 3), draw(vocabulary, channels + 3) / 2)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return draw(tokens, channels), draw(vocabulary, channels) / 2, parent, targets


def plainly(hidden: Tensor, head: Tensor, parent: FullLogits, targets: Tensor, settings: LossSettings) -> Tensor:
    """The whole formula on all logits, by torch's own divergence."""
    tau, beta = settings.temperature, settings.beta
    log_q = (hidden @ head.T / tau).log_softmax(-1)
    log_p = (parent.hidden_NP @ parent.head_VP.T / tau).log_softmax(-1)
    kl = lambda a, b: kl_div(b, a, reduction="sum", log_target=True)  # noqa: E731
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    value = {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "kl_mix": lambda: beta * kl(log_p, log_q) + (1 - beta) * kl(log_q, log_p),
        "jsd": lambda: beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m),
    }[settings.divergence]()
    lm = cross_entropy(hidden @ head.T, targets, reduction="sum")
    return settings.logits * tau**2 * value + settings.lm * lm


def value_and_gradients(function, hidden, head, *rest) -> list[Tensor]:
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = function(hidden, head, *rest)
    (3 * loss).backward()
    return [loss.detach(), hidden.grad, head.grad]


@pytest.mark.parametrize("rows", [1, 3, 1000], ids=lambda rows: f"{rows} rows")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_give_the_plain_formula_and_its_gradients(kind, temperature, rows, monkeypatch):
    monkeypatch.setattr(losses, "TILE_ELEMENTS", (50 * rows, 0))
    settings = LossSettings(kind, beta=0.3, temperature=temperature, logits=0.7, lm=0.2, chunk_tokens=7)
    hidden, head, parent, targets = inputs()
    expected = value_and_gradients(plainly, hidden, head, parent, targets, settings)
    ours = lambda *arguments: head_loss(*arguments).loss  # noqa: E731
    for value, reference in zip(value_and_gradients(ours, hidden, head, parent, targets, settings), expected):
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-11)
    single = FullLogits(*(part.float() for part in parent))
    for value, reference in zip(
        value_and_gradients(ours, hidden.float(), head.float(), single, targets, settings), expected, strict=True
    ):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_trl(kind):
    """TRL's kernel, an independent implementation, in float32."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    settings = LossSettings(kind, beta=0.3, temperature=1.7)
    hidden, head, parent, targets = inputs()
    hidden, head, parent = hidden.float(), head.float(), FullLogits(*(part.float() for part in parent))
    mixed = {0.0: 0.3, 1.0: 0.7}
    parts = {"forward_kl": {0.0: 1.0}, "reverse_kl": {1.0: 1.0}, "kl_mix": mixed, "jsd": {0.3: 1.0}}[kind]

    def theirs(hidden, head):
        whole = lambda beta: ChunkedDivergenceFunction.apply(hidden, head, None, *parent, None, beta, 1.7)[0]  # noqa: E731
        return sum(weight * whole(beta).sum() for beta, weight in parts.items()) * 1.7**2

    ours = lambda *arguments: head_loss(*arguments).loss  # noqa: E731
    values = value_and_gradients(ours, hidden, head, parent, targets, settings)
    for value, reference in zip(values, value_and_gradients(theirs, hidden, head), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=2e-5)


def test_divergences_by_hand():
    log_p, log_q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    m = (0.2 * 0.75 + 0.8 * 0.5, 0.2 * 0.25 + 0.8 * 0.5)
    to_p = 0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1])
    to_q = 0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
    expected_of_kinds = [forward, reverse, 0.2 * forward + 0.8 * reverse, 0.2 * to_p + 0.8 * to_q]
    for kind, expected in zip(KINDS, expected_of_kinds, strict=True):
        assert float(divergence(log_q, log_p, LossSettings(kind, beta=0.2))) == pytest.approx(expected, abs=1e-7)


def top_of(parent: FullLogits, k: int) -> TopKLogits:
    log_p = (parent.hidden_NP @ parent.head_VP.T).log_softmax(-1)
    top, ids = log_p.topk(k)
    return TopKLogits(ids, top, log_p.scatter(1, ids, -math.inf).logsumexp(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_all_tokens_are_the_whole_parent(kind):
    """With all tokens but one, or all, the divergence is exact; with fewer it is smaller."""
    settings = LossSettings(kind, lm=0.5, chunk_tokens=9)
    hidden, head, parent, targets = inputs()
    ours = lambda *arguments: head_loss(*arguments).loss  # noqa: E731
    expected = value_and_gradients(ours, hidden, head, parent, targets, settings)
    for k in (50, 49):
        values = value_and_gradients(ours, hidden, head, top_of(parent, k), targets, settings)
        for value, reference in zip(values, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-9)
    by_k = [float(head_loss(hidden, head, top_of(parent, k), targets, settings).divergence) for k in (49, 12, 3, 1)]
    assert by_k == sorted(by_k, reverse=True) and by_k[0] > by_k[-1] > 0


def test_terms_are_reported_without_their_weights():
    hidden, head, parent, targets = inputs()
    for lm in (0.0, 0.25):
        settings = LossSettings(temperature=2.0, logits=0.5, lm=lm)
        got = head_loss(hidden, head, parent, targets, settings)
        assert float(got.loss) == pytest.approx(float(0.5 * 4 * got.divergence + lm * got.lm), rel=1e-12)
        expected_lm = float(cross_entropy(hidden @ head.T, targets, reduction="sum")) if lm else 0.0
        assert float(got.lm) == pytest.approx(expected_lm, rel=1e-12)


def test_frozen_inputs_get_no_gradient_and_need_no_memory():
    hidden, head, parent, targets = inputs(vocabulary=4000)
    settings = LossSettings(chunk_tokens=4)

    def peak(hidden_trains: bool, head_trains: bool) -> int:
        states, weights = hidden.clone().requires_grad_(hidden_trains), head.clone().requires_grad_(head_trains)
        with LiveBytes() as live:
            head_loss(states, weights, parent, targets, settings).loss.backward()
        assert (states.grad is not None, weights.grad is not None) == (hidden_trains, head_trains)
        return live.peak

    assert peak(True, True) - peak(True, False) > 0.9 * head.nbytes
    with torch.no_grad():
        loss = head_loss(hidden.requires_grad_(), head, parent, targets, settings).loss
    assert not loss.requires_grad and float(loss) > 0


def test_without_targets_loss_and_gradients_are_zero():
    hidden, head, parent, targets = inputs(tokens=0)
    loss, *gradients = value_and_gradients(
        lambda *arguments: head_loss(*arguments).loss, hidden, head, parent, targets, LossSettings()
    )
    assert float(loss) == 0 and all(not gradient.any() for gradient in gradients)


def test_memory_does_not_grow_with_the_number_of_targets(monkeypatch):
    """Peak memory is 4 (2 C V + N D + V D) and the formula's small tiles, whatever the number of targets."""
    monkeypatch.setattr(losses, "TILE_ELEMENTS", (8 * 3000, 0))
    N, V, D, C = 512, 3000, 8, 32

    def peak(N: int) -> int:
        hidden, head, parent, targets = inputs(N, V, D)
        hidden, head = hidden.float().requires_grad_(), head.float().requires_grad_()
        single = FullLogits(*(part.float() for part in parent))
        with LiveBytes() as live:
            head_loss(hidden, head, single, targets, LossSettings(chunk_tokens=C)).loss.backward()
        return live.peak

    for tokens in (N, 2 * N):
        formula = 4 * (2 * C * V + tokens * D + V * D)
        assert formula < peak(tokens) < formula + 12 * 4 * 8 * V
    assert peak(2 * N) < 0.15 * 4 * 2 * N * V  # of one tile of all logits


def test_hidden_distance_by_hand_and_by_gradient():
    child = [
        torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], dtype=torch.float64),
        torch.tensor([[[3.0, 4.0], [1.0, 1.0]]]).double(),
    ]
    parent = [torch.tensor([[[0.0, 5.0], [0.0, 1.0]]]).double(), torch.tensor([[[4.0, 3.0], [-1.0, -1.0]]]).double()]
    child = [states.requires_grad_() for states in child]
    distance = hidden_distance(child, parent, [0.5, 2.0])
    expected = [0.5 * 1 + 2 * (1 - 24 / 25), 0.5 * 0 + 2 * 2]
    torch.testing.assert_close(distance, torch.tensor([expected], dtype=torch.float64))
    distance.sum().backward()
    plain = [states.detach().clone().requires_grad_() for states in child]
    norms = lambda x: x.pow(2).sum(-1).sqrt()  # noqa: E731
    for weight, c, p in zip([0.5, 2.0], plain, parent, strict=True):
        (weight * (1 - (c * p).sum(-1) / norms(c) / norms(p))).sum().backward()
    for ours, reference in zip(child, plain, strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature > 0"),
        ({"beta": 1.0}, "0 < beta < 1"),
        ({"chunk_tokens": 0}, "chunk_tokens >= 1"),
        ({"logits": 0.0}, "one of the first three is positive"),
        ({"hidden": -1.0}, "not negative"),
        ({"layer_weights": [1.0, math.inf]}, "finite"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LossSettings(**settings)


def test_settings_that_do_not_fit_models_or_logits():
    with pytest.raises(ValueError, match="has 2 entries, the models have 3"):
        LossSettings(layer_weights=[1.0, 1.0]).weight_of_layers(3)
    assert LossSettings().weight_of_layers(4) == [0.25] * 4
    for settings in (LossSettings(hidden=1.0), LossSettings(temperature=2.0)):
        with pytest.raises(ValueError, match="contain no hidden states and no other temperatures"):
            settings.check_top_k()
    LossSettings().check_top_k()
