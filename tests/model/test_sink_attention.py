"""Sink attention against transformers' eager attention: outputs, gradients, every kind of mask; and its memory."""

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GptOssForCausalLM
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from lit_puzzle.model import sink_attention as ours
from lit_puzzle.model import sink_key


def both(window: int | None, real_BT: Tensor, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Output and gradients (query, key, value, sinks) of eager and of sink attention: 4 heads of 8 over 2 KV heads.

    Outputs of padding are ignored, in the loss too.
    """
    generator = torch.Generator().manual_seed(1)
    B, T = real_BT.shape
    see = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    shapes = (B, 4, T, 8), (B, 2, T, 8), (B, 2, T, 8), (4,)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    weight_BTHC = torch.randn((B, T, 4, 8), generator=generator) * real_BT[:, :, None, None]
    results = []
    for attend, kind in ((eager_attention_forward, ours.eager_mask), (ours.sink_attention, ours.sink_attention_mask)):
        mask = kind(B, T, T, mask_function=see, attention_mask=real_BT, dtype=dtype)
        assert kind is ours.eager_mask or not isinstance(mask, Tensor)
        q, k, v, sinks = (x.clone().requires_grad_() for x in inputs)
        module: Any = SimpleNamespace(sinks=sinks, num_key_value_groups=2, training=True, sliding_window=window)
        out, _ = attend(module, q, k, v, mask, 8**-0.5, s_aux=sinks)
        (out * weight_BTHC).sum().backward()
        gradients = [x.grad for x in (q, k, v, sinks) if x.grad is not None]
        results.append([out * real_BT[:, :, None, None], *gradients])
        assert len(gradients) == 4
    return results


def padding(kind: str, rows: int, tokens: int) -> Tensor:
    first = torch.arange(rows)[:, None] * tokens // (rows + 1) if kind in ("left", "both") else 0
    last = tokens - torch.arange(rows)[:, None] * tokens // (2 * rows) if kind in ("right", "both") else tokens
    columns = torch.arange(tokens).expand(rows, -1)
    return (columns >= first) & (columns < last)


@pytest.mark.parametrize("kind", ["none", "left", "right", "both"])
@pytest.mark.parametrize("window", [None, 2, 7, 16, 33, 90, 97, 500])
def test_equals_eager(window: int | None, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_key, "BLOCK_TOKENS", (8, 32))  # 97 tokens: 4 to 13 blocks; windows above 32 span several
    eager, sink = both(window, padding(kind, 4, 97))
    for expected, value in zip(eager, sink, strict=True):
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("window", [None, 300, 1100])
@pytest.mark.slow
def test_equals_eager_in_blocks_as_they_are(window: int | None) -> None:
    eager, sink = both(window, padding("left", 2, 1300))
    for expected, value in zip(eager, sink, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 16])
def test_bfloat16_is_as_near_to_float32_as_eager_is(window: int | None) -> None:
    exact = both(window, padding("both", 4, 97))[0]
    eager, sink = both(window, padding("both", 4, 97), torch.bfloat16)
    for reference, expected, value in zip(exact, eager, sink, strict=True):
        assert value.dtype in (torch.bfloat16, torch.float32)
        assert (value - reference).norm() < 1.2 * (expected - reference).norm() + 1e-3


def test_a_row_of_padding_alone_and_a_single_token() -> None:
    real_BT = padding("none", 3, 6).clone()
    real_BT[0] = False
    real_BT[1, :5] = False
    eager, sink = both(3, real_BT)
    for expected, value in zip(eager, sink, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def test_padding_between_tokens_is_refused() -> None:
    real_BT = torch.tensor([[True, True, False, True]])
    with pytest.raises(ValueError, match="padding between tokens"):
        ours.sink_attention_mask(1, 4, 4, causal_mask_function, real_BT)


def test_documents_are_located() -> None:
    """Row 0: padding, then 4 tokens. Row 1: documents of 3 and 2 tokens. Lengths 2 and 3 have two bits, 4 has three."""
    documents = ours._locate_documents(torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 2, 2]]))
    assert [group.tolist() for group in documents.groups] == [[[5, 6, 7], [8, 9, 9]], [[1, 2, 3, 4]]]
    assert documents.slots_N.tolist() == [10, 6, 7, 8, 9, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("lengths", [[1] * 40, [1, 2, 4, 8, 16, 32, 64], [127, 1, 63, 65], [100, 3, 100, 3]])
def test_filling_up_at_most_doubles(lengths: list[int]) -> None:
    ids_BT = torch.cat([torch.full((length,), i + 1) for i, length in enumerate(lengths)])[None]
    assert sum(group.numel() for group in ours._locate_documents(ids_BT).groups) < 2 * sum(lengths)


def test_stock_model_in_training(tiny_model: GptOssForCausalLM) -> None:
    ids = torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(5))
    mask = padding("both", 3, 40).long()
    labels = ids.masked_fill(mask == 0, -100)
    results: list[Any] = []
    for name in ("eager", "sink_attention"):
        tiny_model.set_attn_implementation(name)
        tiny_model.zero_grad()
        output = tiny_model.train()(ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        gradients = [parameter.grad.clone() for parameter in tiny_model.parameters()]
        results.append([output.loss, output.logits[mask.bool()], *gradients])
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, atol=5e-5, rtol=1e-4)


def peak_mib(tokens: int, window: int | None) -> float:
    """The most that forward and backward hold at once beyond their inputs, of what torch allocates: 4 heads of 64."""
    q, k, v = (torch.randn(1, 4, tokens, 64, requires_grad=True) for _ in range(3))
    sinks = torch.randn(4, requires_grad=True)
    module: Any = SimpleNamespace(sliding_window=window)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out, _ = ours.sink_attention(module, q, k, v, None, 0.125, s_aux=sinks)
        out.square().sum().backward()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(change.nbytes() for change in sorted(changes, key=lambda change: change.start_ns()))
    return max(held) / 2**20


@pytest.mark.parametrize("window", [None, 128, 1100])
@pytest.mark.slow
def test_memory_is_linear(window: int | None) -> None:
    """One eager score tensor alone is 256 MiB at 4,096 tokens (4 heads * 4,096^2 * 4 bytes) and grows fourfold."""
    at_2k, at_4k = peak_mib(2048, window), peak_mib(4096, window)
    assert 15 < at_2k < at_4k < 80
    assert at_4k < 2.2 * at_2k
