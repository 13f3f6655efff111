"""Attention kernels that return the log-sum-exp of the scores, and the choice among them.

The sinks are folded in outside (`lit_puzzle.model.sink_folding`), so any kernel without sinks serves. A kernel is a
forward and a backward function on documents of one length side by side (`dense`), or on all documents one after the
other (`varlen`):

    forward(q, k, v, span)               -> out, lse;     lse = log sum over seen keys of exp(scale <q, k>)
    backward(d_out, q, k, v, out, lse, span) -> d_q, d_k, d_v, by exp(score - lse) and <d_out, out> alone

`FLASH_VARLEN` is PyTorch's flash kernel on CUDA, with its own windows and its own grouping of heads. `FLASH_CPU` is
PyTorch's flash kernel on a CPU; it has no windows, so a window is computed by blocks of queries against the band of
keys that they see. `BLOCKS` is matrix products by blocks of queries: for what no fused kernel takes. All are linear in
memory and repeat no key or value. No kernel is given a mask on CUDA: the fused ones there refuse it.

Reads and writes nothing. Source: FlashAttention-2, arXiv 2307.08691; signatures: PyTorch's native_functions.yaml.
Shapes: D documents, H query heads, G key/value heads, R = H / G, L tokens of a document, N tokens of all, C channels;
Q queries and K keys of one block.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BAND_TOKENS = 512  # queries of a block where a window is computed by bands
BLOCK_SCORES = 2**25  # scores that `BLOCKS` holds at once
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_CHANNELS = 256

_aten = torch.ops.aten


class Span(NamedTuple):
    """What a query sees.

    Attributes:
        scale: factor on the query-key products.
        window: tokens that a query sees, itself included; None: all before it.
        bounds: for `varlen`, the positions where documents begin, and the end: (documents + 1), int32.
        longest: for `varlen`, tokens of the longest document.
    """

    scale: float
    window: int | None
    bounds: Tensor | None = None
    longest: int = 0


class Kernel(NamedTuple):
    """One implementation of attention without sinks.

    Attributes:
        layout: `dense`: (D, H, L, C), every document of L tokens; `varlen`: (H, N, C), documents by `Span.bounds`.
        forward: see the head of this file; lse is (D, H, L) or (H, N).
        backward: see the head of this file.
    """

    layout: Literal["dense", "varlen"]
    forward: Callable[[Tensor, Tensor, Tensor, Span], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Span], tuple[Tensor, Tensor, Tensor]]


def choose_kernel(device: torch.device, dtype: torch.dtype, channels: int) -> Kernel | None:
    """Return the kernel for tensors of a kind; the one place that decides.

    A CPU in float32 gets None: the sink as one more key (`lit_puzzle.model.sink_key`), so that published numbers stay
    what they are to the last bit.

    Args:
        device: of queries, keys and values.
        dtype: of queries, keys and values.
        channels: of a head.
    """
    if device.type == "cpu":
        return None if dtype == torch.float32 else FLASH_CPU
    fits = dtype in FLASH_DTYPES and channels % 8 == 0 and channels <= FLASH_CHANNELS
    return FLASH_VARLEN if device.type == "cuda" and fits and _has_flash(device) else BLOCKS


def _has_flash(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _flash_varlen(q: Tensor, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out, lse, *_ = _aten._flash_attention_forward(
        q, k, v, span.bounds, span.bounds, span.longest, span.longest, 0.0, *_causal(span), **_window(span)
    )
    return out.transpose(0, 1), lse


def _flash_varlen_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, span: Span
) -> tuple[Tensor, Tensor, Tensor]:
    d_out, q, k, v, out = (x.transpose(0, 1) for x in (d_out, q, k, v, out))
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which is 0
    lengths = span.bounds, span.bounds, span.longest, span.longest
    gradients = _aten._flash_attention_backward(
        d_out, q, k, v, out, lse, *lengths, 0.0, span.window is None, random_state, random_state[:0], **_window(span)
    )
    d_q, d_k, d_v = (x.transpose(0, 1) for x in gradients)
    return d_q, d_k, d_v


def _causal(span: Span) -> tuple[bool, bool]:
    """Return the arguments is_causal (a window says it by itself) and return_debug_mask."""
    return span.window is None, False


def _window(span: Span) -> dict[str, float | int]:
    """Return the arguments scale and how many tokens are seen before and after a query; -1: all."""
    before, after = (-1, -1) if span.window is None else (span.window - 1, 0)
    return {"scale": span.scale, "window_size_left": before, "window_size_right": after}


FLASH_VARLEN = Kernel("varlen", _flash_varlen, _flash_varlen_backward)


def _bands(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of queries, each with the keys that any of them sees."""
    size = max(BAND_TOKENS, window)
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), slice(max(0, start - window + 1), stop)


def _hidden(queries: slice, keys: slice, window: int | None, device: torch.device) -> Tensor:
    """Return (Q, K), True where a query does not see a key."""
    first = torch.arange(queries.start, queries.stop, device=device)[:, None]
    age_QK = first - torch.arange(keys.start, keys.stop, device=device)
    return age_QK < 0 if window is None else (age_QK < 0) | (age_QK >= window)


def _mask(queries: slice, keys: slice, window: int | None, like: Tensor) -> Tensor:
    """Return the same as a summand of scores."""
    hidden_QK = _hidden(queries, keys, window, like.device)
    return torch.zeros(hidden_QK.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden_QK, float("-inf"))


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    if span.window is None:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=span.scale)
        return out, lse
    parts = []
    for queries, keys in _bands(q.shape[2], span.window):
        seen = k[:, :, keys], v[:, :, keys]
        how = {"attn_mask": _mask(queries, keys, span.window, q), "scale": span.scale}
        parts.append(_aten._scaled_dot_product_flash_attention_for_cpu(q[:, :, queries], *seen, 0.0, False, **how))
    outputs, sums = zip(*parts, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def _flash_cpu_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, span: Span
) -> tuple[Tensor, Tensor, Tensor]:
    backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    if span.window is None:
        d_q, d_k, d_v = backward(d_out, q, k, v, out, lse, 0.0, True, scale=span.scale)
        return d_q, d_k, d_v
    d_q, (d_k, d_v) = torch.empty_like(q), (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
    for queries, keys in _bands(q.shape[2], span.window):
        how = {"attn_mask": _mask(queries, keys, span.window, q), "scale": span.scale}
        of_queries = (x[:, :, queries] for x in (out, lse))
        arguments = d_out[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys], *of_queries
        d_q[:, :, queries], d_k_part, d_v_part = backward(*arguments, 0.0, False, **how)
        d_k[:, :, keys] += d_k_part
        d_v[:, :, keys] += d_v_part
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


FLASH_CPU = Kernel("dense", _flash_cpu, _flash_cpu_backward)


def _blocks(q: Tensor, span: Span) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of queries whose scores are at most `BLOCK_SCORES`, each with the keys that any of them sees."""
    D, H, L, _ = q.shape
    scores = BLOCK_SCORES // (D * H)
    if span.window is None:
        size = scores // L
    else:  # queries of a block see size + window - 1 keys together; more than the window of them, and most are hidden
        others = span.window - 1
        size = min((math.isqrt(others**2 + 4 * scores) - others) // 2, max(BAND_TOKENS, span.window))
    size = max(1, min(L, size))
    for start in range(0, L, size):
        stop = min(start + size, L)
        yield slice(start, stop), slice(0 if span.window is None else max(0, start - span.window + 1), stop)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Return (D, H, Q, ...) as (D, G, R * Q, ...): the queries that share keys lie below one another."""
    return x.unflatten(1, (groups, -1)).flatten(2, 3)


def _scores(q: Tensor, k: Tensor, queries: slice, keys: slice, span: Span) -> Tensor:
    """Return the scores (D, G, R * Q, K) of a block in float32 or more, -inf where a key is not seen."""
    groups = k.shape[1]
    scores = _grouped(q[:, :, queries], groups) @ k[:, :, keys].transpose(2, 3)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * span.scale
    hidden_QK = _hidden(queries, keys, span.window, q.device)
    return scores.masked_fill_(hidden_QK.repeat(q.shape[1] // groups, 1), float("-inf"))


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    outputs, sums = [], []
    for queries, keys in _blocks(q, span):
        scores = _scores(q, k, queries, keys, span)
        lse = scores.logsumexp(-1)
        out = scores.sub_(lse[..., None]).exp_().to(v.dtype) @ v[:, :, keys]
        outputs.append(out.unflatten(2, (-1, queries.stop - queries.start)).flatten(1, 2))
        sums.append(lse.unflatten(2, (-1, queries.stop - queries.start)).flatten(1, 2))
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def _by_blocks_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, span: Span
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, (d_k, d_v) = torch.empty_like(q), (torch.zeros_like(x, dtype=lse.dtype) for x in (k, v))
    groups = k.shape[1]
    for queries, keys in _blocks(q, span):
        q_block, d_block, out_block = (_grouped(x[:, :, queries], groups) for x in (q, d_out, out))
        weights = _scores(q, k, queries, keys, span).sub_(_grouped(lse[:, :, queries, None], groups)).exp_()
        d_v[:, :, keys] += weights.to(v.dtype).transpose(2, 3) @ d_block
        d_weights = (d_block @ v[:, :, keys].transpose(2, 3)).to(weights.dtype)
        drift = (d_block * out_block).sum(-1, keepdim=True, dtype=weights.dtype)
        d_scores = d_weights.sub_(drift).mul_(weights).mul_(span.scale).to(q.dtype)
        d_k[:, :, keys] += d_scores.transpose(2, 3) @ q_block
        d_q[:, :, queries] = (d_scores @ k[:, :, keys]).unflatten(2, (-1, queries.stop - queries.start)).flatten(1, 2)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


BLOCKS = Kernel("dense", _by_blocks, _by_blocks_backward)
