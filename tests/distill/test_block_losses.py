"""Losses of blocks beside one parent forward, in float64, against plain training of one layer that is really pruned."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers.live_bytes import LiveBytes
from helpers.pruned_children import ALL, pruned_child
from torch import Tensor
from transformers import GptOssForCausalLM

from lit_puzzle.data.packing import restarting_positions
from lit_puzzle.distill.block_losses import BlockError, TrainableBlock, block_errors, counted_tokens
from lit_puzzle.distill.block_selection import SelectedBlock
from lit_puzzle.model.blocks import with_own_blocks
from lit_puzzle.model.family import GPT_OSS
from lit_puzzle.model.gpt_oss import GptOssPuzzleForCausalLM
from lit_puzzle.model.surgery import prune_layer
from lit_puzzle.spec import BlockSpec

ROUTER = ("mlp.router.weight", "mlp.router.bias")
QUERIES = ("self_attn.q_proj.weight", "self_attn.sinks")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj_bias", "post_attention_layernorm.weight")
BLOCKS = {
    "experts": SelectedBlock(0, "experts=4", BlockSpec((0, 3, 5, 6), 8), ROUTER, False, True),
    "fewer than top-k": SelectedBlock(0, "experts=1", BlockSpec((4,), 8), EXPERTS, False, True),
    "attention half": SelectedBlock(1, "window=4", BlockSpec(ALL, 4), QUERIES, True, False),
    "whole window": SelectedBlock(1, "window=3", BlockSpec(ALL, 3), QUERIES, True, True),
    "both": SelectedBlock(1, "experts=3,window=4", BlockSpec((1, 2, 6), 4), ROUTER + QUERIES, True, True),
    "trained experts": SelectedBlock(3, "experts=4", BlockSpec((1, 2, 4, 7), None), ROUTER + EXPERTS, False, True),
}


def make_batch(rows: int = 2, tokens: int = 40) -> dict[str, Tensor]:
    """Documents of 13 and 19 tokens, then padding, in each row."""
    generator = torch.Generator().manual_seed(5)
    ids_BT = torch.randint(3, 128, (rows, tokens), generator=generator)
    lengths = [13, 19, tokens - 32]
    numbers_T = torch.repeat_interleave(torch.tensor([0, 1, -1]), torch.tensor(lengths))
    documents_BT = torch.stack([torch.where(numbers_T < 0, -1, numbers_T + 2 * row) for row in range(rows)])
    positions_BT = restarting_positions(documents_BT)
    drawn_BT = torch.rand(rows, tokens, generator=generator) < 0.6
    return {
        "input_ids": ids_BT.where(documents_BT >= 0, 0),
        "document_ids": documents_BT,
        "position_ids": positions_BT,
        "loss_mask": drawn_BT & (documents_BT >= 0) & (positions_BT > 0),
    }


def parent_of(model: GptOssForCausalLM, attention: str = "eager") -> GptOssPuzzleForCausalLM:
    parent = with_own_blocks(model).requires_grad_(False).eval()
    parent.set_attn_implementation(attention)
    return parent


def block_of(parent: Any, what: SelectedBlock) -> TrainableBlock:
    own = {name: parent.model.layers[what.layer].get_parameter(name) for name in what.tensors}
    return TrainableBlock(what, prune_layer(own, what.block.experts, GPT_OSS.layer), GPT_OSS.layer)


def errors(
    parent: GptOssPuzzleForCausalLM,
    blocks: list[TrainableBlock],
    batch: dict[str, Tensor],
    completions_only: bool = False,
) -> Iterator[BlockError]:
    """On one process."""
    return block_errors(parent, blocks, batch, counted_tokens(batch, completions_only), lambda tensor: tensor)


def plain_loss(
    parent: GptOssForCausalLM, child: GptOssPuzzleForCausalLM, what: SelectedBlock, batch: Any, completions_only: bool
) -> Tensor:
    """Each document by itself through both models; the child's layer is given what enters the parent's."""
    half = not what.experts
    kept: dict[str, Tensor] = {}

    def watch(model: Any, whose: str) -> list[Any]:
        """States entering the layer, behind its attention (where the second norm reads them) and leaving it."""
        layer = model.model.layers[what.layer]

        def enter(_: Any, arguments: Any, keywords: Any) -> Any:
            kept.setdefault("enters", arguments[0].detach())
            return (kept["enters"], *arguments[1:]), keywords

        def middle(_: Any, arguments: Any) -> None:
            kept[f"{whose} middle"] = arguments[0]

        def leave(_: Any, __: Any, output: Tensor) -> None:
            kept[f"{whose} leaves"] = output

        return [
            layer.register_forward_pre_hook(enter, with_kwargs=True),
            layer.post_attention_layernorm.register_forward_pre_hook(middle),
            layer.register_forward_hook(leave),
        ]

    hooks = watch(parent, "parent") + watch(child, "child")
    error, norm = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    end = "middle" if half else "leaves"
    for number in batch["document_ids"].unique():
        if number >= 0:
            here_BT = batch["document_ids"] == number
            ids, written = batch["input_ids"][here_BT][None], batch["loss_mask"][here_BT]
            counted = [
                i for i in range(len(written)) if not completions_only or (i + 1 < len(written) and written[i + 1])
            ]
            kept.clear()
            with torch.no_grad():
                parent(input_ids=ids)
            child(input_ids=ids)
            error = error + (kept[f"parent {end}"] - kept[f"child {end}"])[0, counted].square().sum()
            norm = norm + kept[f"parent {end}"][0, counted].square().sum()
    for hook in hooks:
        hook.remove()
    return error / norm


@pytest.mark.parametrize(("attention", "completions_only"), [("eager", False), ("sink_attention", True)])
def test_training_equals_plain_training_of_one_block(
    tiny_model: GptOssForCausalLM, attention: str, completions_only: bool
) -> None:
    """All blocks in one pass, against each pruned layer trained alone: losses, gradients, and three steps."""
    model, batch = tiny_model.double(), make_batch()
    model.set_experts_implementation("eager")  # the one that takes float64
    children = {name: pruned_child(model, what.layer, what.block).double() for name, what in BLOCKS.items()}
    plain_parent, parent = deepcopy(model), parent_of(model, attention)
    blocks = {name: block_of(parent, what) for name, what in BLOCKS.items()}
    optimizer = torch.optim.AdamW([p for block in blocks.values() for p in block.parameters()], lr=0.01)
    theirs: dict[str, tuple[dict[str, Tensor], Any]] = {}
    for name, what in BLOCKS.items():
        layer = children[name].requires_grad_(False).model.layers[what.layer]
        trains = {tensor: layer.get_parameter(tensor).requires_grad_() for tensor in what.tensors}
        theirs[name] = trains, torch.optim.AdamW(list(trains.values()), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        for (name, what), (block, error, norm) in zip(
            BLOCKS.items(),
            errors(parent, list(blocks.values()), batch, completions_only),
            strict=True,
        ):
            (error / norm).backward()
            trains, alone = theirs[name]
            alone.zero_grad()
            loss = plain_loss(plain_parent, children[name], what, batch, completions_only)
            loss.backward()
            torch.testing.assert_close(error / norm, loss, rtol=1e-9, atol=1e-12)
            for tensor, parameter in block.tensors().items():
                gradient = trains[tensor].grad
                assert gradient is not None and gradient.abs().max() > 0, tensor
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-10, msg=name)
            alone.step()
        optimizer.step()
    for name, (trains, _) in theirs.items():
        for tensor, parameter in blocks[name].tensors().items():
            torch.testing.assert_close(parameter, trains[tensor], rtol=1e-6, atol=1e-9)


def test_blocks_equal_to_the_parent_have_loss_zero(tiny_model: GptOssForCausalLM) -> None:
    parent = parent_of(tiny_model, "sink_attention")
    own = SelectedBlock(1, "parent", BlockSpec(ALL, None), ROUTER + QUERIES, True, True)
    wide = SelectedBlock(1, "window=40", BlockSpec(ALL, 40), QUERIES, True, False)
    narrow = SelectedBlock(1, "window=4", BlockSpec(ALL, 4), QUERIES, True, False)
    blocks = [block_of(parent, what) for what in (own, wide, narrow)]
    with torch.no_grad():
        losses = [float(error / norm) for _, error, norm in errors(parent, blocks, make_batch())]
    assert losses[0] == 0 and losses[1] < 1e-10 and losses[2] > 1e-3


def test_experts_are_the_parents_own_tensors(tiny_model: GptOssForCausalLM) -> None:
    """Every block computes with the parameters of the parent and has no parameters but those that train."""
    parent = parent_of(tiny_model)
    seen: list[bool] = []
    layers: Any = parent.model.layers
    own = {layer.mlp.experts: dict(layer.mlp.experts.named_parameters()) for layer in layers}

    def compare(experts: Any, _: Any) -> None:
        now = dict(experts.named_parameters())
        seen.append(all(now[name] is tensor for name, tensor in own[experts].items()))

    for experts in own:
        experts.register_forward_pre_hook(compare)
    blocks = [block_of(parent, BLOCKS[name]) for name in ("experts", "both")]
    for _, error, _ in errors(parent, blocks, make_batch()):
        error.backward()
    assert seen == [True] * 4  # parent and block at layers 0 and 1
    assert [sum(p.numel() for p in block.parameters()) for block in blocks] == [4 * 33, 3 * 33 + 32 * 32 + 4]
    assert all(parameter.grad is None for parameter in parent.parameters())


def peaks(model: GptOssForCausalLM, tokens: int, count: int) -> tuple[int, int]:
    """Most bytes alive at once in two steps with `count` blocks a layer and Adam; how many numbers train."""
    parent = parent_of(model, "sink_attention")
    kept = [tuple(range(first, first + 4)) for first in range(count)]
    names = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    whats = [
        SelectedBlock(layer, str(experts), BlockSpec(experts, 4), (*names, *ROUTER), True, True)
        for layer in (0, 3)
        for experts in kept
    ]
    batch = make_batch(2, tokens)
    with LiveBytes() as live:
        blocks = [block_of(parent, what) for what in whats]
        optimizer = torch.optim.AdamW([p for block in blocks for p in block.parameters()])
        for _ in range(2):
            optimizer.zero_grad()
            for block in errors(parent, blocks, batch):
                block.error.backward()
                del block
            optimizer.step()
    return live.peak, sum(p.numel() for block in blocks for p in block.parameters())


@pytest.mark.slow
def test_memory_is_that_of_one_block_and_16_bytes_a_trained_number(
    tiny_model: GptOssForCausalLM, record_property: Callable[[str, object], None]
) -> None:
    """At two sizes of each: activations do not depend on the number of blocks; a trained number costs 16 bytes."""
    base = {(tokens, count): peaks(tiny_model, tokens, count) for tokens in (512, 1024) for count in (1, 4)}
    record_property("peaks", str(base))
    for tokens in (512, 1024):
        (few, few_numbers), (many, many_numbers) = base[tokens, 1], base[tokens, 4]
        assert (many - few) / (many_numbers - few_numbers) == pytest.approx(16, rel=0.05)
    for count in (1, 4):
        activations = [base[tokens, count][0] - 16 * base[tokens, count][1] for tokens in (512, 1024)]
        assert activations[1] / activations[0] == pytest.approx(2, rel=0.1)
    assert base[1024, 4][0] - 16 * base[1024, 4][1] < 1.05 * (base[1024, 1][0] - 16 * base[1024, 1][1])
