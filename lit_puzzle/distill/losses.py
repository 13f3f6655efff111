"""Losses of distillation as pure functions; the logits of all targets are never in memory at once.

Symbols: z^c, z^p logits of child and parent at one target position, tau temperature, v a token of the vocabulary,
    q = softmax(z^c / tau), p = softmax(z^p / tau)       distributions of child and parent
    forward KL    D = sum_v p_v (log p_v - log q_v)       the child covers all modes of the parent
    reverse KL    D = sum_v q_v (log q_v - log p_v)       the child avoids tokens that are unlikely for the parent
    KL mix        D = b KL(p || q) + (1 - b) KL(q || p),  0 < b < 1
    JSD           D = b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q,  0 < b < 1
    hidden        H = sum_l w_l (1 - cos(h_l^c, h_l^p))   h_l the states after layer l (the last one after its norm)
    LM            C = -log softmax(z^c)_y                 y the target token; no temperature
    loss = [sum over targets (a tau^2 D + c C) + h sum over tokens H] / positions
a, h, c are `LossSettings.logits`, `.hidden`, `.lm`; tau^2 keeps the size of the gradient (arXiv 1503.02531, section 2);
positions = tokens of the batch, padding included: a constant, so that neither accumulation nor the number of processes
changes what is optimized. With the parent's top-k logits only, p and q are distributions over K + 1 outcomes, the last
of which is all other tokens together; tau is 1 then.

`head_loss` computes the targets in chunks. For each chunk it computes logits, replaces them by their gradient with the
plain formula, and accumulates the products with head and states; backward only scales these sums. It needs

    bytes  4 (2 C V + N D + V D)    of C tokens a chunk; V D if the head trains; + V (D + P) where heads are converted
    work   4 N V D multiply-adds    as the plain formula (about 4 * 4.5 N V bytes); TRL's chunked divergence does
                                    6 N V D (its backward computes the logits again): 1.5 times the time

Reads and writes: nothing. Source: arXiv 2411.19146 (KL and cosine), arXiv 2306.13649 (generalized JSD).

Shapes: N targets, V vocabulary, D hidden channels of the child, P of the parent, K top-k logits, C targets of a chunk,
R targets of a tile, B rows, T tokens of a row, S outcomes of a distribution.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint

from lit_puzzle.distill.settings import LossSettings

TILE_ELEMENTS = (1 << 21, 1 << 26)  # logits that the plain formula computes at a time: CPU, GPU
_LOG_ZERO = -100.0  # stands in for log 0, with which 0 log 0 would be NaN


class FullLogits(NamedTuple):
    """The parent's logits at the targets, as the product of states after the last norm (N, P) and its head (V, P)."""

    hidden_NP: Tensor
    head_VP: Tensor


class TopKLogits(NamedTuple):
    """The parent's top-k tokens at the targets, their log-probabilities, and the log of the mass of all others."""

    ids_NK: Tensor
    log_p_NK: Tensor
    log_rest_N: Tensor


class HeadLoss(NamedTuple):
    """Sums over targets: the weighted loss, which has a gradient, and its terms, which have none."""

    loss: Tensor
    divergence: Tensor
    lm: Tensor


def divergence(log_q_NS: Tensor, log_p_NS: Tensor, settings: LossSettings) -> Tensor:
    """Return D of each target (N) from log-probabilities of the child (q) and of the parent (p)."""
    if settings.divergence == "forward_kl":
        return _kl(log_p_NS, log_q_NS)
    if settings.divergence == "reverse_kl":
        return _kl(log_q_NS, log_p_NS)
    beta = settings.beta
    if settings.divergence == "kl_mix":
        return beta * _kl(log_p_NS, log_q_NS) + (1 - beta) * _kl(log_q_NS, log_p_NS)
    log_m_NS = torch.logaddexp(log_q_NS + math.log(1 - beta), log_p_NS + math.log(beta))
    return beta * _kl(log_p_NS, log_m_NS) + (1 - beta) * _kl(log_q_NS, log_m_NS)


def _kl(log_a_NS: Tensor, log_b_NS: Tensor) -> Tensor:
    return (log_a_NS.exp() * (log_a_NS - log_b_NS)).sum(-1)


def top_k_outcomes(logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Return log-probabilities (N, K + 1) of given tokens and of all others together."""
    log_sum_N1 = logits_NV.logsumexp(-1, keepdim=True)
    others_N1 = logits_NV.scatter(1, ids_NK, -math.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([logits_NV.gather(1, ids_NK), others_N1], dim=1) - log_sum_N1
    return log_q.clamp(min=_LOG_ZERO)  # K may be the whole vocabulary


def hidden_distance(child_LBTD: Sequence[Tensor], parent_LBTD: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return H of each token (B, T); only the states of the layers are kept, backward recomputes the rest."""
    terms = [
        checkpoint(_cosine_distance, child_BTD, parent_BTD, weight, use_reentrant=False)
        for child_BTD, parent_BTD, weight in zip(child_LBTD, parent_LBTD, weights, strict=True)
    ]
    return torch.stack(terms).sum(0)


def _cosine_distance(child_BTD: Tensor, parent_BTD: Tensor, weight: float) -> Tensor:
    exact = _exact(child_BTD)
    return weight * (1 - cosine_similarity(child_BTD.to(exact), parent_BTD.to(exact), dim=-1))


def head_loss(
    hidden_ND: Tensor, head_VD: Tensor, parent: FullLogits | TopKLogits, tokens_N: Tensor, settings: LossSettings
) -> HeadLoss:
    """Return a tau^2 D + c C summed over targets, chunk by chunk.

    Args:
        hidden_ND: child's states after the last norm, at the positions before the targets.
        head_VD: its language-model head, whole; it gets a gradient if it trains.
        parent: logits of the parent at the same targets.
        tokens_N: the target tokens.
        settings: weights and kind of the divergence.
    """
    needed = (torch.is_grad_enabled() and hidden_ND.requires_grad, torch.is_grad_enabled() and head_VD.requires_grad)
    loss, sums_3 = _Chunked.apply(hidden_ND, head_VD, parent, tokens_N, settings, needed)
    return HeadLoss(loss, sums_3[1], sums_3[2])


def head_terms(
    logits_RV: Tensor, parent: Tensor | TopKLogits, tokens_R: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a tau^2 D + c C, D and C by the plain formulas, each summed over R targets."""
    if isinstance(parent, TopKLogits):
        rest_R1 = parent.log_rest_N[:, None].to(logits_RV.dtype).clamp(min=_LOG_ZERO)
        log_p = torch.cat([parent.log_p_NK.to(logits_RV.dtype), rest_R1], dim=1)
        log_q = top_k_outcomes(logits_RV, parent.ids_NK.long())
    else:
        log_p, log_q = ((z / settings.temperature).log_softmax(-1) for z in (parent, logits_RV))
    d = divergence(log_q, log_p, settings).sum()
    weighted = settings.logits * settings.temperature**2 * d
    if settings.lm == 0:
        return weighted, d, d.new_zeros(())
    c = (logits_RV.logsumexp(-1) - logits_RV.gather(1, tokens_R[:, None]).squeeze(1)).sum()
    return weighted + settings.lm * c, d, c


class _Chunked(torch.autograd.Function):
    """`head_terms` of all targets; gradients are computed chunk by chunk in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        parent: FullLogits | TopKLogits,
        tokens_N: Tensor,
        settings: LossSettings,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        """Return the first of the terms, and all of them without a gradient."""
        exact, low = _exact(hidden_ND), _product_dtype(hidden_ND)
        sums_3 = torch.zeros(3, dtype=exact, device=hidden_ND.device)
        grad_hidden = torch.zeros_like(hidden_ND, dtype=exact) if needed[0] else None
        grad_head = torch.zeros_like(head_VD, dtype=exact) if needed[1] else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden_ND, head_VD = hidden_ND.detach().to(low), head_VD.detach().to(low)
            if isinstance(parent, FullLogits):
                parent = FullLogits(parent.hidden_NP.to(low), parent.head_VP.to(low))
            for start in range(0, len(hidden_ND), settings.chunk_tokens):
                chunk = slice(start, start + settings.chunk_tokens)
                logits_CV = _matmul(hidden_ND[chunk], head_VD.t())
                sums_3 += _replace_by_gradient(
                    logits_CV, _parent_of(parent, chunk), tokens_N[chunk], settings, any(needed)
                )
                if grad_hidden is not None:
                    grad_hidden[chunk] = _matmul(logits_CV.to(low), head_VD)
                if grad_head is not None:
                    _add_matmul(grad_head, logits_CV.to(low).t(), hidden_ND[chunk])
        ctx.gradients, ctx.needed = (grad_hidden, grad_head), needed
        ctx.mark_non_differentiable(sums_3)
        return sums_3[0].clone(), sums_3

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale in place, which works once: a copy of the head's gradient would be the largest tensor in memory."""
        assert ctx.gradients is not None, "head_loss can be differentiated once"
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if gradient is None else gradient.mul_(grad) for gradient in gradients), None, None, None, None)


def _parent_of(parent: FullLogits | TopKLogits, chunk: slice) -> Tensor | TopKLogits:
    """Return the parent of a chunk for `head_terms`: logits (C, V), or top-k logits."""
    if isinstance(parent, FullLogits):
        return _matmul(parent.hidden_NP[chunk], parent.head_VP.t())
    return TopKLogits(*(part[chunk] for part in parent))


def _replace_by_gradient(
    logits_CV: Tensor, parent: Tensor | TopKLogits, tokens_C: Tensor, settings: LossSettings, needed: bool
) -> Tensor:
    """Return the three terms; `logits_CV` is overwritten by the gradient of the first, a tile of rows at a time.

    Tiles keep the temporaries small enough for a CPU's allocator to reuse their memory, which halves the time.
    """
    sums_3 = logits_CV.new_zeros(3)
    rows = max(1, TILE_ELEMENTS[logits_CV.device.type == "cuda"] // logits_CV.shape[1])
    for start in range(0, len(logits_CV), rows):
        tile = slice(start, start + rows)
        logits_RV = logits_CV[tile]
        parent_R = parent[tile] if isinstance(parent, Tensor) else TopKLogits(*(part[tile] for part in parent))
        with torch.set_grad_enabled(needed):
            loss, d, c = head_terms(logits_RV.requires_grad_(needed), parent_R, tokens_C[tile], settings)
        sums_3 += torch.stack([loss, d, c]).detach()
        if needed:
            (grad_RV,) = torch.autograd.grad(loss, logits_RV)
            logits_CV[tile] = grad_RV
    return sums_3


def token_log_probs(hidden_ND: Tensor, head_VD: Tensor, tokens_N: Tensor, chunk_tokens: int) -> Tensor:
    """Return the log-probability of each target token (N) at temperature 1, without a gradient."""
    with torch.no_grad():
        head_VD, parts = head_VD.to(_product_dtype(hidden_ND)), []
        for hidden_CD, tokens_C in zip(hidden_ND.split(chunk_tokens), tokens_N.split(chunk_tokens), strict=True):
            logits_CV = exact_logits(hidden_CD, head_VD)
            parts.append(logits_CV.gather(1, tokens_C[:, None]).squeeze(1) - logits_CV.logsumexp(-1))
    return torch.cat(parts)


def exact_logits(hidden_CD: Tensor, head_VD: Tensor) -> Tensor:
    """Return the logits of a chunk (C, V) in float32 or more, under autocast too."""
    low = _product_dtype(hidden_CD)
    with torch.autocast(hidden_CD.device.type, enabled=False):
        return _matmul(hidden_CD.to(low), head_VD.to(low).t())


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Return the dtype of products: on a GPU that of autocast or of the states; on a CPU a lower one saves no time."""
    kind = hidden_ND.device.type
    if kind != "cuda" or hidden_ND.dtype == torch.float64:
        return _exact(hidden_ND)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return the product in float32 or more: rounding logits to bfloat16 errs more than child and parent differ."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype.itemsize == 2 else a @ b


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype.itemsize == 2:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b)
