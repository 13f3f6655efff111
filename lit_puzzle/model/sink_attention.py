"""Exact attention with sinks, windows and padding in linear memory: `attn_implementation="sink_attention"`.

For training and scoring with any gpt-oss model, stock or child; importing this module registers it. The eager
attention of transformers, the reference, is quadratic, and its SDPA has no sinks. With cached keys (decoding) this is
the eager computation. Source of the sinks: the gpt-oss model card, arXiv 2508.10925.

A head's sink enters its softmax as one more key before the first: its value is 0, and an extra channel, 1 in this key
and 0 in all others, is sink / scale in every query. A dummy query in front keeps the diagonal of the causal kernel
aligned. A window is computed by blocks of queries over the blocks of keys that they see.

Shapes: B batch, T tokens of a row, N = B * T, H query heads, G key/value heads, C channels of a head; D documents side
by side, L tokens of the longest of them; Q queries and K keys of one block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

BLOCK_TOKENS = (256, 1024)  # queries of a block: as many as the window, within these limits


class Documents(NamedTuple):
    """The positions of the documents of a batch: the content of a mask without its T x T values.

    Attributes:
        groups: for each group of documents of similar length, the positions (row * T + column) of their tokens, (D, L);
            shorter documents are filled with their last token, and the output there is ignored.
        slots_N: index of each token of the batch in the concatenation of all `groups`; padding has the next index.
    """

    groups: tuple[Tensor, ...]
    slots_N: Tensor


def sink_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    s_aux: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention with sinks; the implementation named `sink_attention`, which each attention layer calls.

    Args:
        module: the attention layer; its `sliding_window` is the number of tokens that a query sees, or None.
        query: queries (B, H, T, C).
        key: keys (B, G, T, C).
        value: values (B, G, T, C).
        attention_mask: from `sink_attention_mask`; a tensor (cached keys, or a user's own mask) means eager.
        scaling: factor on the query-key products.
        dropout: on the attention weights; above 0 torch has no linear-memory kernel on CPU.
        s_aux: the sinks (H).
        **kwargs: arguments that only other attention functions use.

    Returns:
        The output (B, T, H, C), 0 for padding, and None instead of the attention weights, which are not materialized.
    """
    if isinstance(attention_mask, Tensor):
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    settings = (s_aux, scaling, dropout, module.sliding_window)
    if attention_mask is None:
        return _attend(query, key, value, *settings).transpose(1, 2).contiguous(), None
    B, H, T, C = query.shape
    flat = [x.transpose(1, 2).reshape(B * T, -1, C) for x in (query, key, value)]
    outputs = []
    for tokens_DL in attention_mask.groups:
        q, k, v = (x.index_select(0, tokens_DL.flatten()).unflatten(0, tokens_DL.shape).transpose(1, 2) for x in flat)
        outputs.append(_attend(q, k, v, *settings).transpose(1, 2).flatten(0, 1))
    outputs.append(query.new_zeros(1, H, C))
    return torch.cat(outputs).index_select(0, attention_mask.slots_N).view(B, T, H, C), None


def _attend(
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


def sink_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Documents | Tensor | None:
    """Return the mask of `sink_attention`: positions of documents.

    Args:
        batch_size: rows of the batch.
        q_length: tokens of this call.
        kv_length: tokens of this call and of the cache.
        mask_function: (row, head, query, key) -> visible; a document begins where a token does not see the last.
        attention_mask: (B, T), False for padding, which may be at both ends of a row.
        device: of the model.
        **kwargs: arguments that only other mask functions use.

    Returns:
        None if each row is one document without padding, else the positions of the documents; with cached keys the
        eager mask.

    Raises:
        ValueError: there is padding between tokens of a row.
    """
    if q_length != kv_length:
        sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        return eager_mask(**sizes, mask_function=mask_function, attention_mask=attention_mask, device=device, **kwargs)
    rows, columns = torch.arange(batch_size, device=device)[:, None], torch.arange(1, q_length, device=device)[None]
    joined_BT = mask_function(rows, 0, columns, columns - 1).expand(batch_size, -1)
    ids_BT = pad((~joined_BT).cumsum(-1), (1, 0)) + 1
    if attention_mask is not None:
        ids_BT = ids_BT * attention_mask
    return None if bool((ids_BT == 1).all()) else _locate_documents(ids_BT)


def _locate_documents(ids_BT: Tensor) -> Documents:
    """Return the runs of equal ids (0 is padding), grouped by bits of length: padding at most doubles a group."""
    B, T = ids_BT.shape
    rows = torch.arange(B, device=ids_BT.device)[:, None]
    ids, counts = torch.unique_consecutive(torch.where(ids_BT > 0, ids_BT + rows * (T + 1), 0), return_counts=True)
    starts, counts = (counts.cumsum(0) - counts)[ids > 0], counts[ids > 0]
    if len(ids[ids > 0].unique()) < len(starts):
        raise ValueError(
            "attention_mask has padding between tokens; sink_attention allows it at the ends of a row only: use eager."
        )
    bits, groups, used, slots_N = counts.float().frexp().exponent, [], 0, ids_BT.new_full((B * T,), -1)
    for group in bits.unique():
        start_D1, count_D1 = starts[bits == group, None], counts[bits == group, None]
        offset_L = torch.arange(int(count_D1.max()), device=ids_BT.device)
        tokens_DL, real_DL = start_D1 + torch.minimum(offset_L, count_D1 - 1), offset_L < count_D1
        slots_N[tokens_DL[real_DL]] = used + real_DL.flatten().nonzero().flatten()
        groups.append(tokens_DL)
        used += tokens_DL.numel()
    return Documents(tuple(groups), slots_N.where(slots_N >= 0, used))


AttentionInterface.register("sink_attention", sink_attention)
AttentionMaskInterface.register("sink_attention", sink_attention_mask)
