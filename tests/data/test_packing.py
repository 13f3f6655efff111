"""Packing: every document whole, in one place, as first fit says; and packed documents are as if each were alone."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GptOssForCausalLM, PreTrainedModel

from lit_puzzle.data.packing import model_inputs, pack, restarting_positions
from lit_puzzle.data.packing_settings import PackingMethod
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM

LENGTHS = [(11, 1, 1, 12, 9), (23, 5), (1, 30)]  # tokens of the documents of each row; rows of 40


def plain_first_fit(lengths: list[int], capacity: int) -> list[int]:
    """First fit as one would write it on a blackboard."""
    used: list[int] = []
    places = []
    for length in lengths:
        fits = [i for i, filled in enumerate(used) if filled + length <= capacity]
        if not fits:
            used.append(0)
        places.append(fits[0] if fits else len(used) - 1)
        used[places[-1]] += length
    return places


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.sampled_from(["first_fit", "sequential"]))
def test_documents_lie_side_by_side(lengths: list[int], packing: PackingMethod) -> None:
    sequences, starts = pack(np.array(lengths), 20, packing)
    covered = np.zeros((sequences.max() + 1, 20), dtype=int)
    for sequence, start, length in zip(sequences, starts, lengths, strict=True):
        assert start + length <= 20
        covered[sequence, start : start + length] += 1
    assert covered.max() == 1 and covered.sum() == sum(lengths)
    assert (np.diff(covered, axis=1) <= 0).all()  # no gap before the end
    if packing == "first_fit":
        assert sequences.tolist() == plain_first_fit(lengths, 20)
    else:
        assert (np.diff(sequences) >= 0).all() and list(sequences) == sorted(sequences)


def test_first_fit_wastes_less() -> None:
    lengths = np.random.default_rng(0).integers(10, 100, 400)
    filled = [lengths.sum() / ((pack(lengths, 128, kind)[0].max() + 1) * 128) for kind in ("sequential", "first_fit")]
    assert filled[0] < 0.8 < 0.92 < filled[1]


@pytest.mark.parametrize("documents", [2**12, 2**12 + 1, 2**14])
@pytest.mark.slow
def test_memory_is_as_the_formula_says(documents: int) -> None:
    lengths = np.random.default_rng(0).integers(10, 3000, documents)
    tracemalloc.start()
    pack(lengths, 8192, "first_fit")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 40 * documents < peak < 100 * documents


def test_positions_restart() -> None:
    ids = torch.tensor([[4, 4, 4, 9, 7, 7, -1, -1], [-1] * 8])
    assert restarting_positions(ids).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], list(range(8))]


def packed_batch() -> tuple[dict[str, Tensor], list[list[Tensor]]]:
    """Rows of documents with padding at the end, and the documents themselves."""
    generator = torch.Generator().manual_seed(3)
    documents = [[torch.randint(3, 128, (length,), generator=generator) for length in row] for row in LENGTHS]
    ids, owners = torch.zeros(3, 40, dtype=torch.long), torch.full((3, 40), -1)
    for i, row in enumerate(documents):
        joined = torch.cat(row)
        ids[i, : len(joined)] = joined
        owners[i, : len(joined)] = torch.repeat_interleave(torch.arange(len(row)), torch.tensor(LENGTHS[i]))
    return {"input_ids": ids, "position_ids": restarting_positions(owners), "document_ids": owners}, documents


def nll(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Summed loss of the tokens after the first."""
    return torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="sum")


def build(kind: str, attention: str, stock: GptOssForCausalLM) -> PreTrainedModel:
    if kind == "stock":
        stock.set_attn_implementation(attention)
        return stock
    blocks: list[Any] = [{"num_local_experts": 8, "sliding_window": window} for window in (8, None, 5, None)]
    model = GptOssPuzzleForCausalLM(GptOssPuzzleConfig.from_parent(stock.config, blocks)).eval()
    model.load_state_dict(stock.state_dict())
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ["eager", "sink_attention"])
@pytest.mark.parametrize("kind", ["stock", "puzzle"])
def test_packed_loss_and_gradients_are_the_sum_of_unpacked_ones(
    kind: str, attention: str, tiny_model: GptOssForCausalLM
) -> None:
    model = build(kind, attention, tiny_model)
    batch, documents = packed_batch()
    logits_BTV = model(**model_inputs(model, batch)).logits
    packed = torch.zeros(())
    for i, row in enumerate(documents):
        for logits_TV, ids_T in zip(logits_BTV[i].split([*LENGTHS[i], 40 - sum(LENGTHS[i])]), row, strict=False):
            packed = packed + nll(logits_TV, ids_T)
    packed.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = sum((nll(model(ids_T[None]).logits[0], ids_T) for row in documents for ids_T in row), torch.zeros(()))
    alone.backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("attention", ["eager", "sink_attention"])
def test_without_model_inputs_documents_attend_each_other(attention: str, tiny_model: GptOssForCausalLM) -> None:
    """What `model_inputs` is for: positions alone are not enough for stock, nor with a mask of padding for a child."""
    batch, _ = packed_batch()
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    padding = (batch["document_ids"] >= 0).long()
    for kind, mask in (("stock", None), ("puzzle", padding)):
        model = build(kind, attention, tiny_model)
        right = model(**model_inputs(model, batch)).logits
        wrong = model(**inputs, attention_mask=mask).logits
        assert (right - wrong).abs()[0, 15:20].max() > 0.1  # in the fourth document, after others


def test_bfloat16_masks_have_the_models_dtype(tiny_model: GptOssForCausalLM) -> None:
    masks = model_inputs(tiny_model.bfloat16(), packed_batch()[0])["attention_mask"]
    assert {mask.dtype for mask in masks.values()} == {torch.bfloat16}


def test_other_models_are_refused(tiny_model: GptOssForCausalLM, tiny_config: Callable[..., Any]) -> None:
    tiny_model.config.model_type = "llama"
    with pytest.raises(ValueError, match="model_type 'llama' is not supported"):
        model_inputs(tiny_model, packed_batch()[0])
