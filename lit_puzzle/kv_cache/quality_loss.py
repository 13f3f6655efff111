"""What an FP8 KV cache does to a model's predictions on documents, and a model on which it must matter.

    kl        = mean over tokens of sum over v of p(v) (log p(v) - log q(v))        p: as it is, q: under the FP8 cache
    log_prob  = mean over tokens of log q(token) - log p(token)
    top1      = share of tokens at which the likeliest next token is another one

Reads and writes nothing. Memory beside the model: 16 bytes for each token of a batch and word of the vocabulary.
Shapes: B rows, T tokens, V vocabulary; N tokens that are predicted; G key/value heads, C channels of
a head.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_puzzle.kv_cache.fp8_cache import Fp8Cache
from lit_puzzle.kv_cache.kv_statistics import Scales


def kv_quality_loss(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], scales: Sequence[Scales | None]
) -> dict[str, float]:
    """Damage of an FP8 cache with given scales.

    Args:
        model: in evaluation mode.
        batches: rows: `input_ids` and `attention_mask`, (B, T), padded at the end.
        scales: of each layer; None: its cache is as it is.

    Returns:
        `kl`, `kl_se` (standard error over tokens), `log_prob`, `top1`.
    """
    kl, gain, other = [], [], []
    for batch in batches:
        ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            plain_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            cache = Fp8Cache(model.config, scales)
            fp8_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True).logits
        predicted_BT = mask_BT[:, 1:].bool()
        p_NV = plain_BTV[:, :-1][predicted_BT].float().log_softmax(-1)
        q_NV = fp8_BTV[:, :-1][predicted_BT].float().log_softmax(-1)
        kl.append((p_NV.exp() * (p_NV - q_NV)).sum(-1).double())
        gain.append((q_NV - p_NV).gather(1, ids_BT[:, 1:][predicted_BT][:, None]).double())
        other.append((p_NV.argmax(-1) != q_NV.argmax(-1)).double())
    kl_N = torch.cat(kl)
    return {
        "kl": float(kl_N.mean()),
        "kl_se": float(kl_N.std() / len(kl_N) ** 0.5),
        "log_prob": float(torch.cat(gain).mean()),
        "top1": float(torch.cat(other).mean()),
    }


def add_outliers(
    model: PreTrainedModel, factor: float, channels: Sequence[int], heads: Sequence[int] | None = None
) -> None:
    """Scales some channels of keys and values, in place; what the model computes stays the same.

    Channel c goes with the one that RoPE turns it with, c + half a head. Keys: rows of k_proj times the factor, of
    q_proj divided by it. Values: rows of v_proj and columns of o_proj. Exact where the factor is a power of two.

    Args:
        model: stock gpt-oss or a child.
        factor: above 1 makes outliers, below 1 values too small for FP8.
        channels: below half a head.
        heads: key/value heads; None: all.
    """
    config = model.config
    groups, half = config.num_key_value_heads, config.head_dim // 2
    factors_GC = torch.ones(groups, config.head_dim, dtype=model.dtype, device=model.device)
    scaled = torch.tensor([*channels, *(channel + half for channel in channels)], dtype=torch.long)
    for head in range(groups) if heads is None else heads:
        factors_GC[head, scaled] = factor
    stored, read = factors_GC.flatten(), factors_GC.repeat_interleave(config.num_attention_heads // groups, 0).flatten()
    for layer in model.model.layers:
        attention = layer.self_attn
        with torch.no_grad():
            for projection in (attention.k_proj, attention.v_proj):
                projection.weight *= stored[:, None]
                projection.bias *= stored
            attention.q_proj.weight /= read[:, None]
            attention.q_proj.bias /= read
            attention.o_proj.weight /= read
