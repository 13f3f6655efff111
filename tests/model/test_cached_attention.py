"""Attention to cached keys: equal to transformers' eager attention, which repeats keys and values; and its memory."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.live_bytes import LiveBytes
from torch import Tensor
from transformers.masking_utils import eager_mask, sliding_window_causal_mask_function
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from lit_puzzle.model import cached_attention
from lit_puzzle.model.cached_attention import attend_cached


def tensors(new: int, cached: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values of 16 heads over 2, sinks, and a mask: 3 rows, padded on the left, a window of 9."""
    generator, K = torch.Generator().manual_seed(1), new + cached
    shapes = (3, 16, new, 8), (3, 2, K, 8), (3, 2, K, 8), (16,)
    real = torch.arange(K) >= torch.tensor([0, 3, cached])[:, None]
    see = sliding_window_causal_mask_function(9)
    mask = eager_mask(3, new, K, q_offset=cached, mask_function=see, attention_mask=real, dtype=dtype)
    return [*(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes), mask]


@pytest.mark.parametrize("scores", [2**26, 5000])
@pytest.mark.parametrize(("new", "cached"), [(1, 40), (1, 0), (13, 28)])
def test_equals_eager(new: int, cached: int, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_attention, "BLOCK_SCORES", scores)  # 5,000: blocks of 2 queries
    q, k, v, sinks, mask = tensors(new, cached)
    module: Any = SimpleNamespace(sinks=sinks, num_key_value_groups=8, training=False)
    expected = eager_attention_forward(module, q, k, v, mask, 0.3)[0]
    value = attend_cached(q, k, v, mask, sinks, 0.3)
    torch.testing.assert_close(value, expected, atol=1e-14, rtol=1e-14)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v, sinks)) for out in (expected, value)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, atol=1e-13, rtol=1e-13)


def test_one_mask_for_each_head() -> None:
    q, k, v, sinks, mask = tensors(13, 28)
    mask = mask.repeat(1, 16, 1, 1)
    mask[:, 5:, :, ::3] = float("-inf")
    module: Any = SimpleNamespace(sinks=sinks, num_key_value_groups=8, training=False)
    expected = eager_attention_forward(module, q, k, v, mask, 0.3)[0]
    torch.testing.assert_close(attend_cached(q, k, v, mask, sinks, 0.3), expected, atol=1e-14, rtol=1e-14)


def test_no_key_is_repeated() -> None:
    """64 heads over 8 of 64 channels: repeated keys and values alone are 16 KiB per row and cached token."""
    peaks = []
    for cached in (1000, 3000):
        shapes = (2, 64, 1, 64), *[(2, 8, cached, 64)] * 2, (64,), (2, 1, 1, cached)
        q, k, v, sinks, mask = (torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)
        with torch.no_grad(), LiveBytes() as live:
            attend_cached(q, k, v, mask, sinks, 0.125)
        peaks.append(live.peak)
    assert 0 < (peaks[1] - peaks[0]) / 2000 / 2 <= 64 * 4 * 3  # at most three copies of the scores in float32
