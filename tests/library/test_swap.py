"""One candidate in the parent: the logits and completions of a really pruned child, and the parent unchanged after."""

from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.pruned_children import ALL, pruned_child
from helpers.recovery_runs import forked
from torch.distributed.tensor import DTensor

from lit_puzzle.library.swap import swapped
from lit_puzzle.model.blocks import with_own_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import GPT_OSS
from lit_puzzle.spec import BlockSpec
from lit_puzzle.training.fabric import FabricSettings, launch, load_parent
from lit_puzzle.training.sharding import full

BLOCKS = {
    "experts": (1, BlockSpec((0, 3, 5, 6), None)),
    "as many as top-k": (0, BlockSpec((2, 7), 8)),
    "fewer than top-k": (2, BlockSpec((4,), 8)),
    "window": (3, BlockSpec(ALL, 5)),
    "both": (1, BlockSpec((1, 2, 6), 3)),
    "wide window": (1, BlockSpec(ALL, 1000)),
}
PROMPT = torch.randint(3, 128, (3, 30), generator=torch.Generator().manual_seed(0))


def trained_for(layer: torch.nn.Module, block: BlockSpec) -> dict[str, torch.Tensor]:
    """A new router row and matrix for each kept expert, and a new query projection."""
    generator = torch.Generator().manual_seed(9)
    names = ("mlp.router.weight", "mlp.router.bias", "mlp.experts.down_proj", "self_attn.q_proj.weight")
    shapes = {name: tuple(layer.get_parameter(name).shape) for name in names}
    rows = GPT_OSS.layer.expert_rows
    pruned = {name: (block.num_experts, *shape[1:]) if name in rows else shape for name, shape in shapes.items()}
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in pruned.items()}


@torch.no_grad()
def logits(model, ids=PROMPT):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("attention", ["eager", "sink_attention"])
@pytest.mark.parametrize("trains", [False, True], ids=["pruned", "trained"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_swapped_block_is_the_pruned_child(tiny_model, name, trains, attention):
    layer, block = BLOCKS[name]
    trained = trained_for(tiny_model.model.layers[layer], block) if trains else {}
    child = pruned_child(tiny_model, layer, block, trained)
    plain = logits(tiny_model)
    parent = with_own_blocks(tiny_model)
    for model in (parent, child):
        model.set_attn_implementation(attention)
    before, config = deepcopy(parent.state_dict()), parent.config.to_dict()
    alone = logits(parent)
    torch.testing.assert_close(alone, plain, rtol=1e-4, atol=1e-4)
    with swapped(parent, layer, block, trained):
        torch.testing.assert_close(logits(parent), logits(child), rtol=1e-4, atol=1e-4)
        if name != "wide window" or trains:
            assert (logits(parent) - alone).abs().max() > 1e-2
    assert torch.equal(logits(parent), alone)
    assert all(torch.equal(tensor, before[key]) for key, tensor in parent.state_dict().items())
    assert parent.config.to_dict() == config


@pytest.mark.parametrize("name", ["window", "both", "fewer than top-k"])
def test_it_generates_what_the_child_generates(tiny_model, name):
    layer, block = BLOCKS[name]
    child, parent = pruned_child(tiny_model, layer, block), with_own_blocks(tiny_model)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(PROMPT)
    mask[1, :9] = 0
    alone = parent.generate(PROMPT, attention_mask=mask, **settings)
    with swapped(parent, layer, block):
        found = parent.generate(PROMPT, attention_mask=mask, return_dict_in_generate=True, **settings)
        assert torch.equal(found.sequences, child.generate(PROMPT, attention_mask=mask, **settings))
        if block.window_tokens is not None:  # the cache of the layer keeps its window, not the sequence
            assert found.past_key_values.layers[layer].keys.shape[2] < block.window_tokens
    assert torch.equal(parent.generate(PROMPT, attention_mask=mask, **settings), alone)
    assert not torch.equal(found.sequences, alone)


def test_everything_comes_back_when_scoring_fails(tiny_model):
    parent = with_own_blocks(tiny_model)
    alone, block = logits(parent), BlockSpec((1, 2), 3)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        swapped(parent, 1, block, trained_for(parent.model.layers[1], block)),
    ):
        raise RuntimeError("in the middle")
    assert torch.equal(logits(parent), alone)


def swap_in_shards(folder: Path, rank: int) -> None:
    """On two processes, 8 experts in two halves: trained rows of both halves, and back."""
    settings = FabricSettings(accelerator="cpu", devices=2)
    model = load_parent(launch(settings), settings, folder / "parent")
    block = BlockSpec((1, 2, 6), 3)
    layer = model.model.layers[1]
    trained = torch.load(folder / "trained.pt")
    weight = layer.get_parameter("mlp.experts.down_proj")
    assert isinstance(weight, DTensor) and weight.to_local().shape[0] == 4
    assert not isinstance(model.lm_head.weight, DTensor)
    before = {name: full(tensor).clone() for name, tensor in layer.named_parameters()}
    with swapped(model, 1, block, trained):
        found = logits(model)
        assert isinstance(layer.get_parameter("mlp.experts.down_proj"), DTensor)  # gathered only while it runs
    torch.testing.assert_close(found, torch.load(folder / "expected.pt"), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(full(tensor), before[name]) for name, tensor in layer.named_parameters())


def test_trained_tensors_are_swapped_in_shards(tiny_model, tmp_path):
    block = BlockSpec((1, 2, 6), 3)
    trained = trained_for(tiny_model.model.layers[1], block)
    tiny_model.save_pretrained(tmp_path / "parent")
    assert len(Checkpoint(tmp_path / "parent").blocks) == 4
    torch.save(trained, tmp_path / "trained.pt")
    torch.save(logits(pruned_child(tiny_model, 1, block, trained)), tmp_path / "expected.pt")
    assert forked(2, partial(swap_in_shards, tmp_path)) == [0, 0]
