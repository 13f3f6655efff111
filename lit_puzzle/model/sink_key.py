"""Attention with sinks by PyTorch's own function and one more key: what a CPU does in float32.

A head's sink enters its softmax as one more key before the first: its value is 0, and an extra channel, 1 in this key
and 0 in all others, is sink / scale in every query. A dummy query in front keeps the diagonal of the causal kernel
aligned. A window is computed by blocks of queries over the blocks of keys that they see. On CUDA this would be slow:
its fused kernels refuse heads of C + 1 channels, and masks.

Reads and writes nothing. Source of the sinks: the gpt-oss model card, arXiv 2508.10925.
Shapes: D documents side by side, L tokens of the longest of them, H query heads, G key/value heads, C channels of a
head; Q queries and K keys of one block.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

BLOCK_TOKENS = (256, 1024)  # queries of a block: as many as the window, within these limits


def attend_with_key(
    q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, scale: float, dropout: float, window: int | None
) -> Tensor:
    """Compute causal attention of left-aligned documents (D, H, L, C), keys and values (D, G, L, C); result like q."""
    length, channels = q.shape[2:]
    # Values get the channel too: torch's linear-memory kernel on CPU needs as many channels as the keys have.
    q, k, v = pad(q, (0, 1, 1, 0)), pad(k, (0, 1, 1, 0)), pad(v, (0, 1, 1, 0))
    q[..., -1] = (sinks_H / scale)[:, None]
    k[:, :, 0, -1] = 1
    if window is None or window >= length:
        out = scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale, enable_gqa=True)
        return out[:, :, 1:, :channels]
    size = min(max(window, BLOCK_TOKENS[0]), BLOCK_TOKENS[1])
    (sink_key, k), (sink_value, v) = k.split([1, length], dim=2), v.split([1, length], dim=2)
    ks, vs, outputs = k.split(size, dim=2), v.split(size, dim=2), []
    for i, block in enumerate(q[:, :, 1:].split(size, dim=2)):
        seen = slice(max(0, i * size - window + 1) // size, i + 1)
        arguments = block, [sink_key, *ks[seen]], [sink_value, *vs[seen]], window, scale, dropout
        # A window of many blocks would keep many copies of each key for the backward pass: recompute them there.
        again = window > size
        outputs.append(
            checkpoint(_attend_block, *arguments, use_reentrant=False) if again else _attend_block(*arguments)
        )
    return torch.cat(outputs, dim=2)[..., :channels]


def _attend_block(q: Tensor, ks: list[Tensor], vs: list[Tensor], window: int, scale: float, dropout: float) -> Tensor:
    """Compute attention of one block of queries to the sink (first of `ks`) and the blocks they see, their own last."""
    k, v = torch.cat(ks, dim=2), torch.cat(vs, dim=2)
    place_K = torch.arange(k.shape[2], device=q.device)
    age_QK = place_K[-q.shape[2] :, None] - place_K
    seen_QK = (age_QK >= 0) & (age_QK < window) | (place_K == 0)
    return scaled_dot_product_attention(q, k, v, seen_QK, dropout, scale=scale, enable_gqa=True)
