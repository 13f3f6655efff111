"""One layer's scores against brute force: mask one expert's router logit to -inf and run the stock layer again."""

import weakref

import pytest
import torch
from helpers.brute_force import brute_force, make_inputs, make_layer, score
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_puzzle.importance.expert_scores import (
    Frequency,
    LeaveOneOut,
    Random,
    Reap,
    entrants,
    evaluate_experts,
    leave_one_out_errors,
    weights_without,
)
from lit_puzzle.importance.scored_layers import ScoredMoE
from lit_puzzle.model.family import GPT_OSS
from lit_puzzle.model.modules import ExpertWeights

METHODS = (LeaveOneOut(), Reap(), Frequency(), Random(seed=5))


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (12, 4), (5, 4), (4, 4), (3, 1), (2, 2)])
def test_layer_equals_brute_force(num_experts, top_k):
    layer, hidden = make_layer(num_experts, top_k), make_inputs()
    counted = torch.rand(hidden.shape[:2], generator=torch.Generator().manual_seed(2)) < 0.7
    ours, output = score(layer, hidden, counted)
    expected = brute_force(layer, hidden, counted)
    assert expected.min() >= 0 and expected.max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(output, layer(hidden)[0], rtol=1e-12, atol=1e-13)


def test_float32_keeps_the_digits_of_a_barely_visible_expert():
    layer, hidden = make_layer(6, 2), make_inputs()
    layer.router.bias[3] += 15  # always chosen with nearly all the weight: its partners' gates are about 1e-6
    counted = torch.ones(hidden.shape[:2], dtype=torch.bool)
    exact = brute_force(layer, hidden, counted)
    ours, _ = score(layer.float(), hidden.float(), counted)
    assert exact.min() < 1e-9
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=0)


def test_reap_and_frequency_equal_their_definitions():
    layer, hidden = make_layer(8, 2), make_inputs()
    counted = torch.ones(hidden.shape[:2], dtype=torch.bool)
    tokens = hidden.flatten(0, 1)
    logits = torch.nn.functional.linear(tokens, layer.router.weight, layer.router.bias)
    sums, counts = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for token, row in zip(tokens, logits, strict=True):
        chosen = sorted(range(8), key=lambda i: -row[i])[:2]
        gates = row[chosen].softmax(0)
        for gate, expert in zip(gates, chosen, strict=True):
            only = torch.tensor([[expert]])
            norm = layer.experts(token[None], only, torch.ones(1, 1, dtype=torch.float64)).norm()
            sums[expert] += gate * norm
            counts[expert] += 1
    torch.testing.assert_close(score(layer, hidden, counted, Reap())[0], sums / counts.clamp(min=1))
    torch.testing.assert_close(score(layer, hidden, counted, Frequency())[0], counts / len(tokens))


def test_random_ignores_the_data_and_follows_its_seed():
    layer, hidden = make_layer(8, 2), make_inputs()
    counted = torch.ones(hidden.shape[:2], dtype=torch.bool)
    first, other_data = (score(layer, inputs, counted, Random(1))[0] for inputs in (hidden, make_inputs(seed=9)))
    torch.testing.assert_close(first, other_data)
    assert (first - score(layer, hidden, counted, Random(2))[0]).abs().min() > 1e-6
    assert first.unique().numel() == 8


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_uncounted_tokens_and_chunks_change_nothing(method):
    layer, hidden = make_layer(8, 2), make_inputs()
    counted = torch.ones(hidden.shape[:2], dtype=torch.bool)
    alone, _ = score(layer, hidden, counted, method, chunk=1000)
    garbage = torch.cat([hidden, torch.full_like(hidden, float("nan"))])
    masked = torch.cat([counted, ~counted])
    torch.testing.assert_close(score(layer, garbage, masked, method, chunk=3)[0], alone, rtol=1e-12, atol=0)


def test_removing_the_only_expert_leaves_zero():
    layer, hidden = make_layer(1, 1), make_inputs()
    counted = torch.ones(hidden.shape[:2], dtype=torch.bool)
    ours, output = score(layer, hidden, counted)
    torch.testing.assert_close(ours, output.square().mean().view(1))


def test_a_never_routed_expert_scores_zero():
    layer, hidden = make_layer(8, 2), make_inputs()
    layer.router.bias[6] = -1e4
    counted = torch.ones(hidden.shape[:2], dtype=torch.bool)
    for method in (LeaveOneOut(), Reap(), Frequency()):
        scores, _ = score(layer, hidden, counted, method)
        assert scores[6] == 0 and scores[:6].min() > 0


def test_ties_take_the_routers_choice_and_the_lowest_entrant():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [float("-inf"), 3.0, 4.0, float("-inf")]])
    chosen = torch.tensor([[0, 2], [3, 1], [2, 1]])
    assert entrants(logits, chosen).tolist() == [[1], [0], [0]]
    assert entrants(logits, torch.arange(4).expand(3, 4)).shape == (3, 0)


def test_identical_experts_score_zero():
    """Four copies of one expert: removing any of them leaves the output as it is."""
    layer, hidden = make_layer(4, 2), make_inputs()
    for parameter in layer.experts.parameters():
        parameter.copy_(parameter[:1].expand_as(parameter).clone())
    counted = torch.ones(hidden.shape[:2], dtype=torch.bool)
    assert score(layer, hidden, counted)[0].max() < 1e-28


def test_hand_computed_error():
    """Gates 2, 1 | 3; outputs 1, 4 | 7: f = 2; without the first (4 + 21) / 4; without the second (2 + 21) / 5."""
    logits = torch.tensor([[2.0, 1.0, 3.0]], dtype=torch.float64).log()
    outputs = torch.tensor([[[1.0], [4.0], [7.0]]], dtype=torch.float64)
    expected = torch.tensor([[(25 / 4 - 2) ** 2, (23 / 5 - 2) ** 2]], dtype=torch.float64)
    torch.testing.assert_close(leave_one_out_errors(logits, outputs, 2), expected)
    assert weights_without(logits, 2)[0, 0].tolist() == pytest.approx([0, 0.25, 0.75])


class PeakBytes(TorchDispatchMode):
    """Largest sum of bytes of storages alive at once that were made inside; views and given tensors cost nothing."""

    def __init__(self, existing: list[Tensor]) -> None:
        super().__init__()
        self.existing = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self.owners: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.existing:
                self.own(tensor)
        self.peak = max(self.peak, self.live)
        return result

    def own(self, tensor: Tensor) -> None:
        pointer, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        self.live += size if pointer not in self.owners else 0
        self.owners[pointer] = self.owners.get(pointer, 0) + 1
        weakref.finalize(tensor, self.disown, pointer, size)

    def disown(self, pointer: int, size: int) -> None:
        self.owners[pointer] -= 1
        if self.owners[pointer] == 0:
            del self.owners[pointer]
            self.live -= size


@pytest.mark.parametrize(("tokens", "hidden"), [(64, 2880), (256, 2880), (256, 720)])
@pytest.mark.slow
def test_memory_formula(tokens, hidden):
    """The docstring's bytes at the router shape of the 120B model: 128 experts, top-4, one chunk."""
    k, intermediate, experts = 4, 16, 128
    layer = make_layer(experts, k, hidden, intermediate).float()
    inputs = torch.randn(1, tokens, hidden, generator=torch.Generator().manual_seed(0))
    scored = ScoredMoE(layer, GPT_OSS, 0, LeaveOneOut(), tokens)
    scored.counted_BT = torch.ones(1, tokens, dtype=torch.bool)
    logits = torch.nn.functional.linear(inputs[0], layer.router.weight, layer.router.bias)
    busiest = int(logits.topk(k + 1).indices.flatten().bincount().max())
    formula = 4 * tokens * hidden * (2 * k + 1) + 8 * tokens * (4 * experts + 4 * k * (k + 1))
    formula += 4 * busiest * (2 * hidden + 6 * intermediate)
    with torch.no_grad(), PeakBytes([*layer.parameters(), inputs, scored.counted_BT]) as memory:
        scored(inputs)
    assert 0.6 * formula < memory.peak < 1.05 * formula
    assert memory.peak < 4 * tokens * experts * hidden / 8


def test_evaluate_experts_equals_the_stock_experts():
    layer, hidden = make_layer(6, 3), make_inputs()[0]
    experts = layer.experts
    weights = ExpertWeights(
        experts.gate_up_proj, experts.gate_up_proj_bias, experts.down_proj, experts.down_proj_bias, 1.702, 7.0
    )
    hidden = hidden * 30  # far enough to reach the clamps
    indices = torch.tensor([[0, 5], [5, 2]]).repeat(len(hidden), 1)[: len(hidden)]
    ours = evaluate_experts(hidden, indices, weights, torch.float64)
    for position in range(2):
        one = torch.ones(len(hidden), 1, dtype=torch.float64)
        torch.testing.assert_close(ours[:, position], experts(hidden, indices[:, position : position + 1], one))
