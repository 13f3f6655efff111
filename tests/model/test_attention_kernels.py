"""Sinks folded into every kernel, on a CPU: equal to transformers' eager attention in float64, forward and backward."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cuda_flash import cuda_flash_on_cpu
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from lit_puzzle.model import attention_kernels as kernels
from lit_puzzle.model import sink_attention as ours
from lit_puzzle.model.attention_kernels import BLOCKS, FLASH_CPU, FLASH_VARLEN, Kernel, Span, choose_kernel
from lit_puzzle.model.sink_folding import attend

KERNELS = {"flash_cpu": FLASH_CPU, "flash_varlen": FLASH_VARLEN, "blocks": BLOCKS}
HEADS, KV_HEADS, CHANNELS = 16, 2, 8


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """Force each kernel, CUDA's by its definition, with blocks so small that 97 tokens are many."""
    chosen = KERNELS[request.param]
    monkeypatch.setattr(kernels, "BAND_TOKENS", 8)
    monkeypatch.setattr(kernels, "BLOCK_SCORES", 16 * 97 * 11)
    monkeypatch.setattr(ours, "choose_kernel", lambda *_: chosen)
    with cuda_flash_on_cpu() if chosen is FLASH_VARLEN else nullcontext() as calls:
        yield chosen
        assert calls is None or {"forward", "backward"} == set(calls)


def rows(kind: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Documents of 3 rows (equal numbers: one document) and where tokens are."""
    ids = torch.zeros(3, tokens, dtype=torch.long)
    real = torch.ones(3, tokens, dtype=torch.bool)
    if kind == "left":
        real[0, : tokens // 3] = real[2, : tokens - 1] = False
    if kind == "packed":
        ids[0, tokens // 2 :] = ids[2, 3:] = 1
        ids[2, tokens // 3 :] = 2
    if kind == "packed and padded":
        ids[1, tokens // 4 :] = 1
        real[1, -(tokens // 5) :] = False
    return ids, real


def both(window: int | None, kind: str, dtype: torch.dtype, tokens: int = 97) -> list[list[Tensor]]:
    """Output and gradients (query, key, value, sinks) of eager and of sink attention; padding is ignored."""
    generator = torch.Generator().manual_seed(3)
    ids, real = rows(kind, tokens)
    plain = causal_mask_function if window is None else sliding_window_causal_mask_function(window)

    def see(row: Any, head: Any, query: Any, key: Any) -> Any:
        return plain(row, head, query, key) & (ids[row, query] == ids[row, key])

    shapes = (3, HEADS, tokens, CHANNELS), *[(3, KV_HEADS, tokens, CHANNELS)] * 2, (HEADS,)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    inputs[3] += 1.0  # a sink that takes much
    weight = torch.randn((3, tokens, HEADS, CHANNELS), generator=generator, dtype=torch.float64)
    weight = (weight * real[:, :, None, None]).to(dtype)
    results = []
    for attend_, kind_ in ((eager_attention_forward, ours.eager_mask), (ours.sink_attention, ours.sink_attention_mask)):
        q, k, v, sinks = (x.clone().requires_grad_() for x in inputs)
        mask = kind_(3, tokens, tokens, mask_function=see, attention_mask=real, dtype=dtype, allow_is_causal_skip=False)
        module: Any = SimpleNamespace(sinks=sinks, num_key_value_groups=8, training=True, sliding_window=window)
        out, _ = attend_(module, q, k, v, mask, CHANNELS**-0.5, s_aux=sinks)
        gradients = torch.autograd.grad((out * weight).sum(), (q, k, v, sinks))
        results.append([out.detach() * real[:, :, None, None], *gradients])
    return results


@pytest.mark.parametrize("kind", ["whole", "left", "packed", "packed and padded"])
@pytest.mark.parametrize("window", [None, 2, 7, 33, 96, 97, 500])
def test_float64_equals_eager(kernel: Kernel, window: int | None, kind: str) -> None:
    for expected, value in zip(*both(window, kind, torch.float64), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", ["whole", "left"])
def test_bfloat16_is_as_near_to_float64_as_eager_is(kernel: Kernel, window: int | None, kind: str) -> None:
    exact = both(window, kind, torch.float64)[0]
    for reference, expected, value in zip(exact, *both(window, kind, torch.bfloat16), strict=True):
        assert value.dtype == torch.bfloat16
        assert (value - reference).norm() < 1.4 * (expected - reference).norm()  # the output is rounded twice


def test_one_token(kernel: Kernel) -> None:
    for expected, value in zip(*both(None, "whole", torch.float64, tokens=1), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("name", ["flash_cpu", "blocks"])
def test_gradients_equal_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not against another implementation, but against the forward pass itself."""
    monkeypatch.setattr(kernels, "BAND_TOKENS", 3)
    torch.manual_seed(0)
    shapes = (2, 4, 11, 3), (2, 2, 11, 3), (2, 2, 11, 3), (4,)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for window in (None, 5):
        how: dict[str, Any] = {"kernel": KERNELS[name], "span": Span(0.6, window)}
        assert torch.autograd.gradcheck(partial(attend, **how), inputs)


def test_what_is_chosen() -> None:
    cpu, mps = torch.device("cpu"), torch.device("mps")
    assert choose_kernel(cpu, torch.float32, 64) is None
    assert choose_kernel(cpu, torch.bfloat16, 64) is choose_kernel(cpu, torch.float64, 65) is FLASH_CPU
    assert choose_kernel(mps, torch.bfloat16, 64) is BLOCKS


@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 64), (torch.bfloat16, 65), (torch.bfloat16, 512)])
def test_cuda_gets_no_flash_for_what_it_refuses(dtype: torch.dtype, channels: int) -> None:
    """Decided before a GPU is asked for its generation."""
    assert choose_kernel(torch.device("cuda"), dtype, channels) is BLOCKS


def test_dropout_is_refused() -> None:
    q = torch.zeros(1, 2, 3, 8)
    module: Any = SimpleNamespace(sliding_window=None)
    with pytest.raises(ValueError, match=r"no dropout, attention_dropout is 0\.1"):
        ours.sink_attention(module, q, q, q, None, 1.0, 0.1, s_aux=torch.zeros(2))


@pytest.mark.parametrize("window", [None, 1, 2, 128, 512, 8192])
@pytest.mark.parametrize(("rows", "heads", "tokens"), [(1, 8, 65536), (1, 64, 131072), (64, 64, 900), (1, 1, 1)])
def test_blocks_hold_no_more_scores_than_they_may(window: int | None, rows: int, heads: int, tokens: int) -> None:
    q = torch.empty(rows, heads, tokens, 64, device="meta")
    blocks = list(kernels._blocks(q, Span(1.0, window)))
    assert [queries.start for queries, _ in blocks] == [0, *(queries.stop for queries, _ in blocks[:-1])]
    assert blocks[-1][0].stop == tokens
    for queries, keys in blocks:
        assert keys.stop >= queries.stop and keys.start <= max(0, queries.start - (window or tokens) + 1)
        size = queries.stop - queries.start
        assert size == 1 or rows * heads * size * (keys.stop - keys.start) <= kernels.BLOCK_SCORES
