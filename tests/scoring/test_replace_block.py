"""Layer by layer = whole models one after the other; in a file = in memory; memory is independent of the depth."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from helpers.live_bytes import LiveBytes
from helpers.token_losses import token_losses
from torch import Tensor
from transformers import GptOssForCausalLM

from lit_puzzle.library.swap import swapped
from lit_puzzle.model.blocks import with_own_blocks
from lit_puzzle.scoring.block_quality import METRICS, NO_TOKEN
from lit_puzzle.scoring.replace_block import ReplaceOneBlock, lay_out, next_tokens
from lit_puzzle.scoring.settings import FEWEST_TOKENS, Memory
from lit_puzzle.spec import BlockSpec

ALL = tuple(range(8))
CASES = [(1, BlockSpec((0, 5, 6), None)), (1, BlockSpec(ALL, 4)), (3, BlockSpec((2,), 6))]


def sequences(count: int = 5) -> list[list[list[int]]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 128, (20 - 3 * i,), generator=generator).tolist() for i in range(count)]
    return [rows[start : start + 2] for start in range(0, count, 2)]


def scorer(model, memory: Memory | None = None, scratch=None, batches=None) -> ReplaceOneBlock:
    batches = batches or sequences()
    size = sum(len(batch) for batch in batches)
    return ReplaceOneBlock(model, lay_out(batches, 0, 1), size, memory or Memory(), scratch, lambda tensor: tensor)


def naive(model, layer: int, block: BlockSpec) -> dict[str, list[float]]:
    """One sequence at a time through the whole model, all of it in float64 formulas."""
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for row in (row for batch in sequences() for row in batch):
        ids = torch.tensor([row])
        targets = torch.tensor([*row[1:], NO_TOKEN])
        with torch.no_grad():
            parent = model.model(input_ids=ids).last_hidden_state[0]
            with swapped(model, layer, block):
                child = model.model(input_ids=ids).last_hidden_state[0]
        tokens = token_losses(parent, child, model.lm_head.weight.detach(), targets)
        for column, name in enumerate(METRICS):
            values[name].append(float(tokens[:, column].sum()) / (len(row) - (name == "lm_loss")))
    return values


@pytest.mark.parametrize("kept", [True, False], ids=["log-probs kept", "log-probs again"])
def test_layer_by_layer_is_whole_models_one_after_the_other(tiny_model, kept):
    model = with_own_blocks(tiny_model)
    work = scorer(model, Memory(log_probs_gib=float(kept), chunk_logits=128 * 7))
    assert (work.log_probs_NV is not None) == kept
    work.start(0)
    for layer, block in CASES:
        work.advance(layer)
        found, expected = work.quality_loss(block), naive(model, layer, block)
        assert found["kl"][0] > 1e-3
        for name in METRICS:
            assert found[name] == pytest.approx(expected[name], rel=2e-3, abs=2e-5), name


def test_the_parents_own_block_costs_no_quality(tiny_model):
    work = scorer(with_own_blocks(tiny_model))
    work.start(2)
    assert {value for values in work.quality_loss(BlockSpec(ALL, 8)).values() for value in values} == {0.0}


def test_starting_in_the_middle_and_a_file_give_the_same_bits(tiny_model, tmp_path):
    model, block = with_own_blocks(tiny_model), BlockSpec((1, 2), None)
    work = scorer(model)
    work.start(0)
    work.advance(1)
    work.advance(3)
    expected = work.quality_loss(block)
    mapped = scorer(model, Memory(hidden_gib=0), tmp_path / "hidden")
    mapped.start(3)
    assert mapped.quality_loss(block) == expected
    assert (tmp_path / "hidden").stat().st_size == work.entering_TD.nbytes


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_shares_of_the_batches_add_up(tiny_model, processes):
    model, block = with_own_blocks(tiny_model), BlockSpec((1, 2), None)
    whole = scorer(model)
    whole.start(1)
    expected, sums = whole.quality_loss(block), []
    for rank in range(processes):
        parts, collected = lay_out(sequences(), rank, processes), list[Tensor]()

        def collect(tensor: Tensor, into: list[Tensor] = collected) -> Tensor:
            into.append(tensor)
            return tensor

        assert len(parts) == -(-3 // processes)
        share = ReplaceOneBlock(model, parts, 5, Memory(), Path("unused"), collect)
        share.start(1)
        share.quality_loss(block)
        sums.append(collected)
    added, counts = (torch.stack(tensors).sum(0) for tensors in zip(*sums, strict=True))
    values = added / counts
    for column, name in enumerate(METRICS):
        assert values[:, column].tolist() == pytest.approx(expected[name], rel=1e-6, abs=1e-7)


def test_memory_is_one_set_of_hidden_states_whatever_the_depth(tiny_config):
    """At two depths and two amounts of data: what is held is the formula, what works on it stays the same."""
    working = []
    for num_layers, tokens in ((2, 64), (5, 64), (2, 192), (5, 192)):
        torch.manual_seed(0)
        model = with_own_blocks(GptOssForCausalLM(tiny_config(num_hidden_layers=num_layers, vocab_size=2048)).eval())
        model.set_attn_implementation("sink_attention")
        with LiveBytes() as live:
            score_all(model, [[[7 + i] * 64] for i in range(tokens // 64)])
        held = 2 * tokens * model.config.hidden_size * 4
        working.append(live.peak - held)
    assert 0 < working[0] < 7.2 * 4 * FEWEST_TOKENS * 2048
    assert working == pytest.approx([working[0]] * 4, rel=0.01)


def score_all(model, batches) -> None:
    work = scorer(model, Memory(log_probs_gib=0, chunk_logits=1), batches=batches)
    work.start(0)
    for layer in range(model.config.num_hidden_layers):
        work.advance(layer)
        work.quality_loss(BlockSpec((1, 2), 8 if layer % 2 == 0 else None))


def test_next_tokens_end_with_the_sequence():
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert next_tokens(ids, mask).tolist() == [[6, 7, NO_TOKEN], [9, NO_TOKEN, NO_TOKEN]]


def test_only_tokens_before_generated_ones_are_scored():
    """From the last token of a prompt to the last but one of the sequence: a generated token follows each of them."""
    (part,) = lay_out([[[5, 6, 7, 8, 9], [5, 6, 7], [5, 6]]], 0, 1, [[2, 2, 0]])
    assert part.batch["scored_mask"].long().tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert part.scored == slice(0, 6) and part.tokens == slice(0, 15)


def test_sizes_below_zero_are_refused():
    with pytest.raises(ValueError, match="sizes must be 0 or more"):
        Memory(hidden_gib=-1)


def test_the_model_is_left_as_it_was(tiny_model):
    model = with_own_blocks(tiny_model)
    before = deepcopy(model.state_dict())
    work = scorer(model)
    work.start(1)
    work.quality_loss(BlockSpec((1, 2), 5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
