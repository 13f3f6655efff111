"""Exact attention with sinks, windows and padding in linear memory: `attn_implementation="sink_attention"`.

For training, scoring and decoding with any gpt-oss model, stock or child; importing this module registers it. The eager
attention of transformers, the reference, is quadratic, and its SDPA has no sinks.

How it is computed depends on the tensors alone, as `choose_kernel` and this table say:

    tokens of whole documents   a fused kernel, with the sink folded in by the log-sum-exp (`sink_folding`)
    with cached keys            heads grouped over their keys (`cached_attention`)
    both, on a CPU in float32   the sink as one more key (`sink_key`), and transformers' eager attention: the numbers
                                that this project publishes, to the last bit

A mask is never made: documents are cut out of the batch, and a kernel gets their bounds or computes them side by side.

Shapes: B batch, T tokens of a row, N = B * T, H query heads, G key/value heads, C channels of a head; D documents side
by side, L tokens of the longest of them, M tokens of all documents.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from lit_puzzle.model.attention_kernels import Kernel, Span, choose_kernel
from lit_puzzle.model.cached_attention import attend_cached
from lit_puzzle.model.sink_folding import attend
from lit_puzzle.model.sink_key import attend_with_key


class Documents(NamedTuple):
    """The positions of the documents of a batch: the content of a mask without its T x T values.

    Attributes:
        groups: for each group of documents of similar length, the positions (row * T + column) of their tokens, (D, L);
            shorter documents are filled with their last token, and the output there is ignored.
        slots_N: index of each token of the batch in the concatenation of all `groups`; padding has the next index.
        tokens_M: positions of the tokens of all documents, one document after the other.
        bounds: where documents begin in `tokens_M`, and the end: (documents + 1), int32.
        longest: tokens of the longest document.
    """

    groups: tuple[Tensor, ...]
    slots_N: Tensor
    tokens_M: Tensor
    bounds: Tensor
    longest: int


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of documents side by side: q, k, v -> output like q


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
        value: values (B, G, T, C); their dtype, or under autocast its, is that of the computation.
        attention_mask: from `sink_attention_mask`; a tensor for cached keys, or a user's own mask.
        scaling: factor on the query-key products.
        dropout: on the attention weights; gpt-oss has none.
        s_aux: the sinks (H).
        **kwargs: arguments that only other attention functions use.

    Returns:
        The output (B, T, H, C), 0 for padding, and None instead of the attention weights, which are not materialized.

    Raises:
        ValueError: a dropout above 0, which no kernel here has.
    """
    if dropout > 0:
        raise ValueError(f"sink_attention has no dropout, attention_dropout is {dropout}: set it to 0, or use eager.")
    dtype = value.dtype  # under autocast rotary tables may be float32, and a cache that follows the keys' dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    kernel = choose_kernel(query.device, query.dtype, query.shape[-1])
    if isinstance(attention_mask, Tensor):
        if kernel is None:
            return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
        return attend_cached(query, key, value, attention_mask, s_aux, scaling), None
    window, longest = module.sliding_window, query.shape[2] if attention_mask is None else attention_mask.longest
    span = Span(scaling, None if window is None or window >= longest else window)
    if kernel is not None and kernel.layout == "varlen":
        return _one_after_another(query, key, value, s_aux, attention_mask, kernel, span), None

    def side_by_side(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kernel is None:
            return attend_with_key(q, k, v, s_aux, scaling, dropout, window)
        return attend(q, k, v, s_aux, kernel, span)

    return _in_groups(query, key, value, attention_mask, side_by_side), None


def _one_after_another(
    q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, documents: Documents | None, kernel: Kernel, span: Span
) -> Tensor:
    """Compute all documents in one call of a kernel that takes their bounds."""
    B, H, T, C = q.shape
    if documents is None:
        tokens_M, longest = None, T
        bounds = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
    else:
        whole = len(documents.tokens_M) == B * T  # then they are in their order: nothing is cut out
        tokens_M, bounds, longest = None if whole else documents.tokens_M, documents.bounds, documents.longest
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    if tokens_M is not None:
        flat = [x.index_select(0, tokens_M) for x in flat]
    q, k, v = (x.transpose(0, 1) for x in flat)
    out = attend(q, k, v, sinks_H, kernel, span._replace(bounds=bounds, longest=longest)).transpose(0, 1)
    if tokens_M is not None:
        out = out.new_zeros(B * T, H, C).index_copy(0, tokens_M, out)
    return out.reshape(B, T, H, C)


def _in_groups(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, side_by_side: Attend) -> Tensor:
    """Compute documents of similar length side by side, group after group."""
    if documents is None:
        return side_by_side(q, k, v).transpose(1, 2).contiguous()
    B, H, T, C = q.shape
    flat = [x.transpose(1, 2).reshape(B * T, -1, C) for x in (q, k, v)]
    outputs = []
    for tokens_DL in documents.groups:
        cut = (x.index_select(0, tokens_DL.flatten()).unflatten(0, tokens_DL.shape).transpose(1, 2) for x in flat)
        outputs.append(side_by_side(*cut).transpose(1, 2).flatten(0, 1))
    outputs.append(q.new_zeros(1, H, C))
    return torch.cat(outputs).index_select(0, documents.slots_N).view(B, T, H, C)


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
    tokens_M = (ids_BT > 0).flatten().nonzero().flatten()
    bounds, longest = pad(counts.cumsum(0), (1, 0)).to(torch.int32), int(counts.max()) if len(counts) else 0
    bits, groups, used, slots_N = counts.float().frexp().exponent, [], 0, ids_BT.new_full((B * T,), -1)
    for group in bits.unique():
        start_D1, count_D1 = starts[bits == group, None], counts[bits == group, None]
        offset_L = torch.arange(int(count_D1.max()), device=ids_BT.device)
        tokens_DL, real_DL = start_D1 + torch.minimum(offset_L, count_D1 - 1), offset_L < count_D1
        slots_N[tokens_DL[real_DL]] = used + real_DL.flatten().nonzero().flatten()
        groups.append(tokens_DL)
        used += tokens_DL.numel()
    return Documents(tuple(groups), slots_N.where(slots_N >= 0, used), tokens_M, bounds, longest)


AttentionInterface.register("sink_attention", sink_attention)
AttentionMaskInterface.register("sink_attention", sink_attention_mask)
