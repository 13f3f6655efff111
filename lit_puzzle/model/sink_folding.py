"""Attention with sinks from a kernel that has none: the sink is folded in by the log-sum-exp of the scores.

A head's sink s is one more summand of the softmax's denominator, with value 0. With out and lse of a kernel without
sinks (`lit_puzzle.model.attention_kernels`):

    forward     lse' = log(exp(lse) + exp(s)),   out' = out sigmoid(lse - s) = out exp(lse - lse')
    backward    d_q, d_k, d_v: the kernel's own backward, called with out' and lse' in place of out and lse;
                d_s = - sum over queries of <d_out', out'> exp(s - lse')

The kernel's backward needs the probabilities, exp(score - lse'), and <d_out', out'>, which is what the sum over keys of
probability x d_probability is with the sink too, because its value is 0. So both are exact, without a gradient through
lse, an extra key or an extra channel. Kept for the backward pass: q, k, v, out', lse' and the sinks.

Reads and writes nothing. Source of the sinks: the gpt-oss model card, arXiv 2508.10925.
Shapes: as in `lit_puzzle.model.attention_kernels`; tensors are (..., H, L, C), lse and its like (..., H, L).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_puzzle.model.attention_kernels import Kernel, Span

TOKENS = 2048  # of a slice in which the gradient of the sinks is summed


def attend(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, kernel: Kernel, span: Span) -> Tensor:
    """Compute causal attention with sinks in the layout of the kernel; differentiable in all four tensors.

    Args:
        q: queries (..., H, L, C).
        k: keys (..., G, L, C).
        v: values (..., G, L, C).
        sinks_H: the sinks.
        kernel: attention without sinks.
        span: what a query sees.

    Returns:
        The output, with the shape and the dtype of `q`.
    """
    out: Tensor = _Fold.apply(q, k, v, sinks_H, kernel, span)
    return out


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, kernel: Kernel, span: Span) -> Tensor:
        out, lse = kernel.forward(q, k, v, span)
        sinks = sinks_H.to(lse.dtype)[:, None]
        out = out.mul_((lse - sinks).sigmoid()[..., None])
        ctx.save_for_backward(q, k, v, sinks_H, out, torch.logaddexp(lse, sinks))
        ctx.kernel, ctx.span = kernel, span
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_H, out, lse = ctx.saved_tensors
        d_q, d_k, d_v = ctx.kernel.backward(d_out, q, k, v, out, lse, ctx.span)
        d_sinks = _sink_gradient(d_out, out, sinks_H, lse) if ctx.needs_input_grad[3] else None
        return d_q, d_k, d_v, d_sinks, None, None


def _sink_gradient(d_out: Tensor, out: Tensor, sinks_H: Tensor, lse: Tensor) -> Tensor:
    """Return the gradient of the sinks, by slices of tokens: the products are in the precision of `lse`."""
    total_H = lse.new_zeros(len(sinks_H))
    for d_slice, slice_, lse_slice in zip(*(x.split(TOKENS, -2) for x in (d_out, out, lse[..., None])), strict=True):
        pulled = (d_slice.to(lse.dtype) * slice_).sum(-1)
        pulled *= (sinks_H.to(lse.dtype)[:, None] - lse_slice[..., 0]).exp()
        total_H -= pulled.sum(-1).view(-1, len(sinks_H)).sum(0)
    return total_H.to(sinks_H.dtype)
