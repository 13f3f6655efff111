"""Attention of new tokens to cached keys, with sinks and any mask: decoding.

    weights_K = exp(score_K) / (exp(sink) + sum over keys of exp(score))

The query heads that share a key/value head lie below one another in one matrix product, so no key or value is repeated:
a row of 64 query and 8 key/value heads reads its cache once and holds, for one new token, its scores only. Many new
tokens (a prompt behind a cached one) are computed by blocks of queries.

Reads and writes nothing. Memory: 8 bytes * `BLOCK_SCORES` scores, or those of one query of each row.
Shapes: B rows, H query heads, G key/value heads, Q queries, K keys, C channels of a head.
"""

import torch
from torch import Tensor

BLOCK_SCORES = 2**26


def attend_cached(
    q_BHQC: Tensor, k_BGKC: Tensor, v_BGKC: Tensor, mask_BxQK: Tensor, sinks_H: Tensor, scale: float
) -> Tensor:
    """Compute attention with sinks under a mask; differentiable.

    Args:
        q_BHQC: queries.
        k_BGKC: keys, the cached ones first.
        v_BGKC: values.
        mask_BxQK: summand of the scores, equal for all heads or, in its second dimension, one for each.
        sinks_H: the sinks.
        scale: factor on the query-key products.

    Returns:
        The output (B, Q, H, C).
    """
    B, H, Q, _ = q_BHQC.shape
    size = max(1, BLOCK_SCORES // (B * H * k_BGKC.shape[2]))
    outputs = []
    for start in range(0, Q, size):
        block, seen = slice(start, start + size), mask_BxQK[:, :, start : start + size]
        outputs.append(_attend_block(q_BHQC[:, :, block], k_BGKC, v_BGKC, seen, sinks_H, scale))
    out_BHQC = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return out_BHQC.transpose(1, 2).contiguous()


def _attend_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks_H: Tensor, scale: float) -> Tensor:
    """Compute the output (B, H, Q, C) of one block of queries."""
    groups, queries = k.shape[1], q.shape[2]
    scores = q.unflatten(1, (groups, -1)).flatten(2, 3) @ k.transpose(2, 3)
    scores = scores.unflatten(2, (-1, queries)).to(torch.promote_types(scores.dtype, torch.float32)) * scale
    mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (groups, -1))
    scores = scores + mask
    sinks = sinks_H.to(scores.dtype).view(groups, -1, 1, 1)
    lse = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sinks)
    weights = (scores - lse).exp().to(v.dtype).flatten(2, 3)
    return (weights @ v).unflatten(2, (-1, queries)).flatten(1, 2)
