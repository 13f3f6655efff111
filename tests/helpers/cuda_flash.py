"""PyTorch's flash attention operators of CUDA, computed on a CPU by plain matrix products: their definition.

The code that calls them then runs on a CPU as it does on a GPU: the operators' own schemas, documents by their bounds,
windows, grouped heads. What the CUDA kernels refuse is refused here, except float64, in which errors of a formula show.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library


@contextmanager
def cuda_flash_on_cpu() -> Iterator[list[str]]:
    """Inside the context the two operators work on CPU tensors; yields the list of calls."""
    library, calls = Library("aten", "IMPL", "CPU"), []

    def forward(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, k_bounds: Tensor, longest: int, k_longest: int,
        dropout: float, causal: bool, debug: bool, *, scale: float, window_size_left: int, window_size_right: int,
        **rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        calls.append("forward")
        _check([q, k, v], bounds, k_bounds, longest, k_longest, dropout)
        assert not debug and not rest
        out, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], len(q), dtype=_exact(q))
        for part in _documents(bounds):
            scores = _scores(q[part], k[part], scale, causal, window_size_left, window_size_right)
            lse[:, part] = scores.logsumexp(-1)
            weights = (scores - lse[:, part, None]).exp()
            out[part] = torch.einsum("hqk,khc->qhc", weights, _repeated(v[part], q)).to(q.dtype)
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.zeros(0), torch.zeros(0)

    def backward(
        d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, k_bounds: Tensor,
        longest: int, k_longest: int, dropout: float, causal: bool, random_state: Tensor, unused: Tensor,
        *, scale: float, window_size_left: int, window_size_right: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        calls.append("backward")
        _check([q, k, v], bounds, k_bounds, longest, k_longest, dropout)
        assert out.shape == q.shape == d_out.shape and lse.shape == (q.shape[1], len(q))
        gradients = [torch.zeros_like(x, dtype=_exact(x)) for x in (q, k, v)]
        for part in _documents(bounds):
            keys, values = _repeated(k[part], q), _repeated(v[part], q)
            scores = _scores(q[part], k[part], scale, causal, window_size_left, window_size_right)
            weights = (scores - lse[:, part, None]).exp()
            pulled = d_out[part].to(weights.dtype)
            drift = (pulled * out[part]).sum(-1).T
            d_scores = weights * (torch.einsum("qhc,khc->hqk", pulled, values) - drift[..., None]) * scale
            gradients[0][part] = torch.einsum("hqk,khc->qhc", d_scores, keys)
            queries = q[part].to(weights.dtype)
            for i, full in ((1, torch.einsum("hqk,qhc->khc", d_scores, queries)),
                            (2, torch.einsum("hqk,qhc->khc", weights, pulled))):  # fmt: skip
                gradients[i][part] = full.unflatten(1, (k.shape[1], -1)).sum(2)
        return tuple(gradient.to(q.dtype) for gradient in gradients)

    library.impl("_flash_attention_forward", forward)
    library.impl("_flash_attention_backward", backward)
    try:
        yield calls
    finally:
        library._destroy()


def _check(
    tensors: list[Tensor], bounds: Tensor, k_bounds: Tensor, longest: int, k_longest: int, dropout: float
) -> None:
    q, k, v = tensors
    lengths = bounds.diff()
    assert all(x.ndim == 3 and x.stride(-1) == 1 and x.dtype == q.dtype and len(x) == len(q) for x in tensors)
    assert q.dtype in (torch.bfloat16, torch.float16, torch.float64)
    assert q.shape[2] % 8 == 0 and q.shape[2] <= 256 and k.shape == v.shape and q.shape[1] % k.shape[1] == 0
    assert bounds.dtype == torch.int32 and bounds.is_contiguous() and torch.equal(bounds, k_bounds)
    assert bounds[0] == 0 and bounds[-1] == len(q) and bool((lengths > 0).all())
    assert longest == k_longest == int(lengths.max()) and dropout == 0


def _documents(bounds: Tensor) -> Iterator[slice]:
    for first, last in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        yield slice(first, last)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1).to(_exact(x))


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, before: int, after: int) -> Tensor:
    """Scores (H, Q, K) of one document; `before` and `after`: tokens seen on either side, -1: all."""
    scores = torch.einsum("qhc,khc->hqk", q.to(_exact(q)), _repeated(k, q)) * scale
    age = torch.arange(len(q))[:, None] - torch.arange(len(k))
    seen = torch.ones_like(age, dtype=torch.bool)
    if causal:
        seen &= age >= 0
    if before >= 0:
        seen &= age <= before
    if after >= 0:
        seen &= -age <= after
    return scores.masked_fill(~seen, float("-inf"))
