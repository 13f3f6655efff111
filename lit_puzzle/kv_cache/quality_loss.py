"""Quality loss of a model under an FP8 KV cache, on documents; and outliers for a model on which scales matter.

    kl        = mean over tokens of sum over v of p(v) (log p(v) - log q(v))
    log_prob  = mean over tokens of log q(token) - log p(token)
    top1      = share of tokens for which the most likely next token differs

p: probabilities under the model's own cache, q: under the FP8 cache.

Reads and writes nothing. Memory in addition to the model: 16 bytes x tokens of a batch x vocabulary size.
Shapes: B rows, T tokens, V vocabulary, N predicted tokens, G key/value heads, C channels of a head.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_puzzle.kv_cache.fp8_cache import Fp8Cache
from lit_puzzle.kv_cache.scales import ScalePair
from lit_puzzle.model.modules import attention_of, model_family


def kv_quality_loss(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], scales: Sequence[ScalePair | None]
) -> dict[str, float]:
    """Return the quality loss of an FP8 cache with given scales.

    Args:
        model: model in evaluation mode.
        batches: rows: `input_ids` and `attention_mask`, (B, T), padded on the right.
        scales: scales of each layer; a layer with None keeps its own cache.

    Returns:
        `kl` (nats), `kl_se` (standard error over tokens), `log_prob`, `top1`.
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
    """Scale some channels of keys and values in place, without changing what the model computes.

    Channel c is scaled together with channel c + half a head, which RoPE rotates it with. Rows of the key projection
    are multiplied by the factor and rows of the query projection divided by it, likewise rows of the value projection
    and columns of the output projection. Exact if the factor is a power of two.

    Args:
        model: parent or child.
        factor: factor of the scaled channels: above 1 makes outliers, below 1 values too small for FP8.
        channels: channels to scale, each below half a head.
        heads: key/value heads to scale; None: all.
    """
    config = model.config
    groups, half = config.num_key_value_heads, config.head_dim // 2
    factors_GC = torch.ones(groups, config.head_dim, dtype=model.dtype, device=model.device)
    scaled = torch.tensor([*channels, *(channel + half for channel in channels)], dtype=torch.long)
    for head in range(groups) if heads is None else heads:
        factors_GC[head, scaled] = factor
    stored, read = factors_GC.flatten(), factors_GC.repeat_interleave(config.num_attention_heads // groups, 0).flatten()
    family = model_family(model)
    for layer in model.model.layers:
        attention = attention_of(layer, family)
        queries, keys, values, output = (attention.get_submodule(name) for name in family.layer.projections)
        with torch.no_grad():
            for projection in (keys, values):
                projection.weight *= stored[:, None]
                projection.bias *= stored
            queries.weight /= read[:, None]
            queries.bias /= read
            output.weight /= read
