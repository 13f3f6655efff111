"""Attention of generation in float32 on a CPU: `attn_implementation="decoding_attention"`.

    prompts of few scores    transformers' eager attention: the published numbers, to the last bit
    longer prompts           `sink_attention`, in linear memory; equal but for rounding
    tokens behind a cache    transformers' eager attention

Few are at most `EAGER_SCORES` = rows * query heads * tokens^2: 1,024 tokens of one row of gpt-oss's 64 heads, 4,096 of
one row of 4. Importing this module registers it. Memory of eager attention: four copies of the scores, at most 1 GiB.
Shapes: B rows, H query heads, G key/value heads, T new tokens, K keys, C channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import eager_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from lit_puzzle.model.sink_attention import Documents, sink_attention, sink_attention_mask

NAME = "decoding_attention"
EAGER_SCORES = 2**26


def decoding_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention with sinks as the mask says, which `decoding_mask` has made.

    Args:
        module: the attention layer.
        query: queries (B, H, T, C).
        key: keys (B, G, K, C).
        value: values (B, G, K, C).
        attention_mask: a tensor (eager attention), or the positions of documents (`sink_attention`).
        scaling: factor on the query-key products.
        dropout: on the attention weights; gpt-oss has none.
        **kwargs: among them `s_aux`, the sinks (H).

    Returns:
        The output (B, T, H, C), and the weights where they were materialized.
    """
    how = sink_attention if not isinstance(attention_mask, Tensor) else eager_attention_forward
    return how(module, query, key, value, attention_mask, scaling, dropout, **kwargs)


def decoding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    *,
    config: PretrainedConfig,
    **kwargs: Any,
) -> Documents | Tensor | None:
    """Return the mask of eager attention where there is a cache or there are few scores, else that of `sink_attention`.

    Args:
        batch_size: rows of the batch.
        q_length: tokens of this call.
        kv_length: tokens of this call and of the cache.
        mask_function: (row, head, query, key) -> visible.
        attention_mask: (B, K), False for padding.
        device: of the model.
        config: of the model.
        **kwargs: arguments that only other mask functions use.
    """
    few = batch_size * config.num_attention_heads * q_length**2 <= EAGER_SCORES
    make = eager_mask if few or q_length != kv_length else sink_attention_mask
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    return make(
        **sizes, mask_function=mask_function, attention_mask=attention_mask, device=device, config=config, **kwargs
    )


AttentionInterface.register(NAME, decoding_attention)
AttentionMaskInterface.register(NAME, decoding_mask)
