"""Router replay: recorded routes change no bit, other routes change exactly what they should."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_puzzle.generation.padding import pad_left
from lit_puzzle.generation.policy import load_policy
from lit_puzzle.generation.route_replay import NONE, RouteReplay, recorded, routed, sequences_of
from lit_puzzle.training.settings import LoraSettings
from lit_puzzle.training.trainable import add_adapters

CHILD = Path(__file__).parents[2] / "lit_puzzle" / "assets" / "tiny_child"
ROWS = [[1, 8, 3, 13, 14, 20, 31], [1, 9, 4], [1, 8, 3, 13, 15]]


@pytest.fixture
def model() -> Any:
    return load_policy(CHILD, "float32")[0].train()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    ids, mask = pad_left(ROWS, 0)
    right = torch.zeros(len(ROWS), 2, dtype=torch.long)  # completions are padded on the right
    return torch.cat([ids, right], 1), torch.cat([mask, right], 1)


def logits_and_gradients(policy: Any, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    policy.zero_grad()
    logits = policy(input_ids=batch[0], attention_mask=batch[1], use_cache=False).logits
    logits[batch[1].bool()].log_softmax(-1)[:, 5].sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in policy.parameters() if p.grad is not None)]


def own_routes(model: Any, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    with recorded(model) as found, torch.no_grad():
        model(input_ids=batch[0], attention_mask=batch[1], use_cache=False)
    return sequences_of(found, batch[1], model.config.num_experts_per_tok)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_own_routes_change_no_bit(model, batch, wrapped, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    targets = LoraSettings(rank=2, target_modules=["q_proj"], target_parameters=["router.weight"])
    policy = add_adapters(model, targets).train() if wrapped else model
    routes = own_routes(model, batch)
    assert [len(route) for route in routes] == [7, 3, 5]
    plain = logits_and_gradients(policy, batch)
    replay = RouteReplay(policy, model)
    replay.remember(ROWS, routes)
    replayed = logits_and_gradients(policy, batch)
    assert replay.replayed == (15, 15)
    assert len(plain) == len(replayed) > 10
    assert all(torch.equal(one, other) for one, other in zip(plain, replayed, strict=True))


def test_other_routes_are_used_whatever_the_order_of_rows(model, batch):
    """Replaying the routes of changed weights gives what a router that chose them gives; rows may be shuffled."""
    plain = logits_and_gradients(model, batch)[0]
    with torch.no_grad():
        for decoder in model.model.layers:
            decoder.mlp.router.bias.add_(torch.randn_like(decoder.mlp.router.bias))
    other = own_routes(model, batch)
    shifted = [decoder.mlp.router.bias.clone() for decoder in model.model.layers]
    expected = logits_and_gradients(model, batch)[0]
    assert not torch.allclose(plain, expected, atol=1e-3)
    replay = RouteReplay(model, model)
    replay.remember(ROWS, other)
    with torch.no_grad():  # a tiny change of the weights, as between engine and policy
        for decoder, bias in zip(model.model.layers, shifted, strict=True):
            decoder.mlp.router.bias.copy_(bias + 1e-7 * torch.randn_like(bias))
    order = torch.tensor([2, 0, 1])
    found = logits_and_gradients(model, (batch[0][order], batch[1][order]))[0]
    mask = batch[1][order].bool()
    assert torch.allclose(found[mask], expected[order][mask], atol=1e-4)


def test_rows_without_routes_and_a_last_token_use_their_own(model, batch):
    plain = logits_and_gradients(model, batch)
    replay = RouteReplay(model, model)
    routes = own_routes(model, batch)
    replay.remember(ROWS[:2], [routes[0][:-1], routes[1][:-1]])
    found = logits_and_gradients(model, batch)
    assert replay.replayed == (6 + 2, 15)
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


def test_state_goes_into_a_checkpoint_and_back(model, batch, tmp_path):
    replay, other = RouteReplay(model, model), RouteReplay(model, model)
    replay.remember(ROWS, own_routes(model, batch))
    torch.save(replay.state(), tmp_path / "state.pt")
    other.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(other.routes[tuple(row)], replay.routes[tuple(row)]) for row in ROWS)


def test_a_case_by_hand():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    own = (logits, logits.topk(2).values.softmax(-1), logits.topk(2).indices)
    routes = torch.tensor([[3, 0, 1], [NONE, NONE, NONE]])
    _, scores, indices = routed(own, routes)
    assert indices.tolist() == [[3, 0], [3, 2]]
    assert torch.allclose(scores[0], torch.tensor([0.0, 1.0]).softmax(-1)) and torch.equal(scores[1], own[1][1])


def test_chunks_are_refused(model, batch):
    from lit_puzzle.training.moe_chunks import chunk_experts

    chunk_experts(model, 4)
    replay = RouteReplay(model, model)
    replay.remember(ROWS, [torch.zeros(len(row), 6, 2) for row in ROWS])
    with pytest.raises(ValueError, match=r"leave training\.moe_chunk_tokens out"):
        logits_and_gradients(model, batch)
