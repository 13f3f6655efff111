"""Keys and values of a model, computed from its projections and RoPE as complex numbers, without any cache."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


def keys_and_values(model: PreTrainedModel, rows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values (N, G, C) of every layer, for sequences that run one by one, without padding."""
    config = model.config
    inputs: dict[int, list[Tensor]] = {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _m, _a, keywords, i=i: inputs.setdefault(i, []).append(keywords["hidden_states"]), with_kwargs=True
        )
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    half = config.head_dim // 2
    found = []
    for i, layer in enumerate(model.model.layers):
        keys, values = [], []
        for hidden in inputs[i]:
            projections = layer.self_attn.k_proj, layer.self_attn.v_proj
            k, v = (project(hidden)[0].view(-1, config.num_key_value_heads, 2 * half) for project in projections)
            angles = torch.arange(len(k))[:, None] * model.model.rotary_emb.inv_freq  # of each position and channel
            turn = torch.polar(torch.ones_like(angles), angles)[:, None] * model.model.rotary_emb.attention_scaling
            turned = torch.complex(k[..., :half], k[..., half:]) * turn
            keys.append(torch.cat([turned.real, turned.imag], -1).detach())
            values.append(v.detach())
        found.append((torch.cat(keys), torch.cat(values)))
    return found
