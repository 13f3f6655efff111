"""The moving average against its recurrence written out."""

import pytest
import torch
from torch import Tensor, nn

from lit_puzzle.training.ema import WeightAverage


def average_of(average: WeightAverage) -> Tensor:
    value = average.average_0
    assert isinstance(value, Tensor)
    return value


def test_recurrence_and_swap():
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, decay=0.25)
    expected = 1.0
    for update, weight in enumerate([3.0, -2.0, 8.0, 4.0], start=1):
        model.weight.data.fill_(weight)
        average.update(update)
        decay = min(0.25, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * weight
    assert (1 + 1) / (10 + 1) < 0.25 < (1 + 3) / (10 + 3), "both bounds are met"
    assert float(average_of(average)) == pytest.approx(expected)
    average.swap()
    assert model.weight.item() == pytest.approx(expected) and float(average_of(average)) == 4.0
    average.swap()
    assert model.weight.item() == 4.0 and float(average_of(average)) == pytest.approx(expected)


def test_averages_are_saved_and_frozen_weights_have_none():
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, decay=0.5)
    assert {name: tuple(value.shape) for name, value in average.state_dict().items()} == {"average_0": (3, 2)}
    assert list(average.parameters()) == [] and not average_of(average).requires_grad
    assert torch.equal(average_of(average), model.weight)
