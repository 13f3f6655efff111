"""Surgery on a layer: rows bit for bit, router with them, and the answers of masked experts."""

import pytest
import torch
from helpers.released_twin import twin_tensors
from torch import Tensor
from transformers import GptOssForCausalLM

from lit_puzzle.model.family import GPT_OSS
from lit_puzzle.model.mxfp4 import expert_weight
from lit_puzzle.model.surgery import prune_layer


def layer_of(tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.fixture
def plain_layer(tiny_model: GptOssForCausalLM) -> dict[str, Tensor]:
    return layer_of({name: tensor.detach() for name, tensor in tiny_model.state_dict().items()}, 1)


def test_kept_rows_are_the_parents_rows_and_the_rest_is_untouched(plain_layer: dict[str, Tensor]) -> None:
    kept = (0, 3, 4, 7)
    pruned = prune_layer(plain_layer, kept, GPT_OSS.layer)
    assert pruned.keys() == plain_layer.keys()
    changed = {name for name in pruned if pruned[name] is not plain_layer[name]}
    assert changed == {
        "mlp.router.weight",
        "mlp.router.bias",
        "mlp.experts.gate_up_proj",
        "mlp.experts.gate_up_proj_bias",
        "mlp.experts.down_proj",
        "mlp.experts.down_proj_bias",
    }
    for name in changed:
        for new, old in enumerate(kept):
            assert torch.equal(pruned[name][new], plain_layer[name][old]), name


def test_mxfp4_rows_are_selected_bit_for_bit() -> None:
    layer = layer_of(twin_tensors(), 0)
    kept = (1, 2, 6)
    pruned = prune_layer(layer, kept, GPT_OSS.layer)
    for matrix in ("gate_up_proj", "down_proj"):
        for kind in ("_blocks", "_scales", "_bias"):
            name = f"mlp.experts.{matrix}{kind}"
            assert torch.equal(pruned[name].view(torch.uint8), layer[name][[1, 2, 6]].view(torch.uint8))
        blocks, scales = f"mlp.experts.{matrix}_blocks", f"mlp.experts.{matrix}_scales"
        whole, part = expert_weight(layer[blocks], layer[scales]), expert_weight(pruned[blocks], pruned[scales])
        assert torch.equal(part, whole[[1, 2, 6]])


def test_pruned_layer_computes_what_masked_router_logits_compute(tiny_model: GptOssForCausalLM) -> None:
    kept = [0, 2, 5]
    mlp = tiny_model.model.layers[0].mlp
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3))
    pruned = prune_layer({f"mlp.{name}": tensor for name, tensor in mlp.state_dict().items()}, kept, GPT_OSS.layer)
    with torch.no_grad():
        mlp.router.bias[[index for index in range(8) if index not in kept]] = float("-inf")
        expected = mlp(hidden)[0]
        logits = hidden @ pruned["mlp.router.weight"].T + pruned["mlp.router.bias"]
        weights, chosen = torch.topk(logits, 2, dim=-1)
        weights = weights.softmax(-1)
        result = torch.zeros_like(hidden)
        for slot in range(2):
            index = chosen[..., slot]
            gate_up = torch.einsum("bti,btio->bto", hidden, pruned["mlp.experts.gate_up_proj"][index])
            gate_up = gate_up + pruned["mlp.experts.gate_up_proj_bias"][index]
            gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
            inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            out = torch.einsum("bti,btio->bto", inner, pruned["mlp.experts.down_proj"][index])
            result += weights[..., slot, None] * (out + pruned["mlp.experts.down_proj_bias"][index])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_permuting_experts_changes_no_output(tiny_model: GptOssForCausalLM) -> None:
    tokens = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(4))
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    with torch.no_grad():
        expected = tiny_model(tokens).logits
        for layer in tiny_model.model.layers:
            layer.load_state_dict(prune_layer(layer.state_dict(), order, GPT_OSS.layer))
        permuted = tiny_model(tokens).logits
    torch.testing.assert_close(permuted, expected, rtol=1e-5, atol=1e-5)


def test_keeping_all_and_keeping_neighbors_copies_nothing(plain_layer: dict[str, Tensor]) -> None:
    for kept in (range(8), range(2, 5)):
        pruned = prune_layer(plain_layer, list(kept), GPT_OSS.layer)
        for name, tensor in pruned.items():
            assert tensor.untyped_storage().data_ptr() == plain_layer[name].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("kept", "message"),
    [((), "at least one"), ((1, 1), "only once"), ((0, 8), r"indices 0\.\.7.*\[8\]"), ((-1,), r"\[-1\]")],
)
def test_impossible_selection_is_refused(plain_layer: dict[str, Tensor], kept: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_layer(plain_layer, kept, GPT_OSS.layer)
