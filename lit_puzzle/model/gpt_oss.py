"""A gpt-oss whose layers differ: each has its own number of experts and its own attention window.

Reads and writes Hugging Face folders with `model_type: gpt_oss_puzzle`; tensor names are those of stock gpt-oss. Every saved
folder carries this very file, so it imports only torch, transformers and the standard library. Source: arXiv 2602.11937
(the search space and the released model).

Importing it also offers `attn_implementation="sink_attention"` to every gpt-oss model, the stock one included: exact attention
with sinks and windows in linear memory, for training and scoring; with cached keys (decoding) it is the eager computation.

Shapes: B batch, T tokens, E embedding, H query heads, G key/value heads, C channels of a head; for sink attention D documents
side by side, L tokens of the longest of them, Q queries and K keys of one block, N tokens of the whole batch.
"""

from dataclasses import fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers import GptOssConfig, GptOssForCausalLM, GptOssModel, GptOssPreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, eager_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssDecoderLayer,
    GptOssRMSNorm,
    GptOssRotaryEmbedding,
    eager_attention_forward,
    load_balancing_loss_func,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

DERIVED = ("per_layer_config", "allow_global_per_layer_attribute_access")  # of a configuration: never on file


class GptOssPuzzleConfig(GptOssConfig):
    """The configuration of a heterogeneous gpt-oss: `block_configs` says what each layer is, and nothing else does.

    `block_configs` holds `{"num_local_experts": int, "sliding_window": int | None}` for each layer. `layer_types` and
    transformers' `per_layer_config` (it sizes the KV cache of each layer, and is never written) are derived from it; a file
    where they disagree is refused. The model-wide `num_local_experts` and `sliding_window` only fill in what is not given.
    """

    model_type = "gpt_oss_puzzle"
    block_configs: list[dict[str, int | None]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        on_file, types_on_file = kwargs.pop("per_layer_config", None), self.layer_types
        if self.block_configs is None or on_file is not None:
            blocks = self._blocks_from(on_file or {})
            if self.block_configs not in (None, blocks):
                raise ValueError(f"per_layer_config means {blocks}, block_configs is {self.block_configs}: remove the former.")
            self.block_configs = blocks
        self._check_blocks(self.block_configs)
        self.layer_types = [_layer_type(block["sliding_window"]) for block in self.block_configs]
        if types_on_file not in (None, self.layer_types):
            raise ValueError(f"layer_types is {types_on_file}, block_configs means {self.layer_types}: remove the former.")
        super().__post_init__(**kwargs)
        self.per_layer_config = dict(enumerate(self.block_configs))
        self.allow_global_per_layer_attribute_access = True  # stock code reads the model-wide values and would die

    def _blocks_from(self, per_layer: dict[int | str, dict[str, Any]]) -> list[dict[str, int | None]]:
        """The blocks of transformers' sparse `per_layer_config`; the stock layout (even layers windowed) where it is silent."""
        sparse = {int(i): overrides for i, overrides in per_layer.items()}
        types = self.layer_types or [_layer_type(None if i % 2 else 1) for i in range(self.num_hidden_layers)]
        windows = [None if layer_type == _layer_type(None) else self.sliding_window for layer_type in types]
        stock = ({"num_local_experts": self.num_local_experts, "sliding_window": window} for window in windows)
        return [block | sparse.get(i, {}) for i, block in enumerate(stock)]

    def _check_blocks(self, blocks: list[dict[str, int | None]]) -> None:
        if len(blocks) != self.num_hidden_layers:
            raise ValueError(f"block_configs has {len(blocks)} entries, num_hidden_layers is {self.num_hidden_layers}: give one a layer.")
        for i, block in enumerate(blocks):
            if set(block) != {"num_local_experts", "sliding_window"}:
                raise ValueError(f"block_configs[{i}] is {block}: give num_local_experts and sliding_window, nothing else.")
            experts, window = block["num_local_experts"], block["sliding_window"]
            if type(experts) is not int or experts < 1:
                raise ValueError(f"block_configs[{i}] has num_local_experts={experts}: give an integer of at least 1.")
            if window is not None and (type(window) is not int or window < 2):
                raise ValueError(f"block_configs[{i}] has sliding_window={window}: give an integer of at least 2, or null.")

    @classmethod
    def from_gpt_oss(cls, config: GptOssConfig, block_configs: list[dict[str, int | None]]) -> Self:
        """The configuration of a child of the model of `config`: all of it, except for what `block_configs` says."""
        replaced = ("model_type", "architectures", "layer_types", "block_configs", "auto_map")
        settings = {name: value for name, value in config.to_dict().items() if name not in replaced}
        settings |= {"attn_implementation": config._attn_implementation, "experts_implementation": config._experts_implementation}
        return cls(**settings, block_configs=block_configs, architectures=["GptOssPuzzleForCausalLM"])

    def get_gpt_oss_config_for_layer(self, layer_idx: int) -> GptOssConfig:
        """The stock configuration in which layer `layer_idx` is as here; with fewer experts than top-k it routes to them all."""
        block = self.block_configs[layer_idx]
        settings = {field.name: vars(self)[field.name] for field in fields(GptOssConfig)} | block
        settings["num_experts_per_tok"] = min(self.num_experts_per_tok, block["num_local_experts"])
        return GptOssConfig(**settings)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in DERIVED}

    def to_diff_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_diff_dict().items() if name not in DERIVED}


def _layer_type(window: int | None) -> str:
    return "full_attention" if window is None else "sliding_attention"


class GptOssPuzzleModel(GptOssModel):
    """The decoder: stock gpt-oss layers, each built from its own configuration, one mask for each distinct window."""

    config: GptOssPuzzleConfig
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: GptOssPuzzleConfig) -> None:
        GptOssPreTrainedModel.__init__(self, config)  # not GptOssModel's, which would build uniform layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [GptOssDecoderLayer(config.get_gpt_oss_config_for_layer(i), i) for i in range(config.num_hidden_layers)]
        )
        for (
            layer
        ) in self.layers:  # the model's own object, so that set_attn_implementation and its like reach the layers
            layer.self_attn.config = layer.mlp.experts.config = config
        self.norm = GptOssRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = GptOssRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """As stock; `position_ids` that restart mark packed documents, which do not see each other."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        hidden_BTE = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        masks = self._masks(hidden_BTE, attention_mask, past_key_values, position_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden_BTE.shape[1], device=hidden_BTE.device) + seen)[None]
        rotary = self.rotary_emb(hidden_BTE, position_ids)
        for layer, block in zip(self.layers, self.config.block_configs, strict=True):
            hidden_BTE = layer(
                hidden_BTE,
                attention_mask=masks[block["sliding_window"]],
                position_embeddings=rotary,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_BTE), past_key_values=past_key_values)

    def _masks(self, hidden_BTE: Tensor, attention_mask: Tensor | None, cache: Cache | None, position_ids: Tensor | None) -> dict:
        """Window -> mask, from the configuration and the cache of the first layer that has this window."""
        masks: dict[int | None, Any] = {}
        for i, window in enumerate(block["sliding_window"] for block in self.config.block_configs):
            if window not in masks:
                create = create_causal_mask if window is None else create_sliding_window_causal_mask
                masks[window] = create(self.config.per_layer_config[i], hidden_BTE, attention_mask, cache, position_ids, layer_idx=i)
        return masks


class GptOssPuzzleForCausalLM(GptOssForCausalLM):
    """The language model; its state-dict names are those of stock `GptOssForCausalLM`."""

    config: GptOssPuzzleConfig
    _can_set_experts_implementation_cached_value = True  # transformers looks for its decorator in this file, in vain
    _keys_to_ignore_on_load_unexpected = [
        r"self_attn\.[kv]_scale$"
    ]  # scales of an FP8 KV cache: for the serving engine only

    def __init__(self, config: GptOssPuzzleConfig) -> None:
        GptOssPreTrainedModel.__init__(self, config)
        self.model = GptOssPuzzleModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As stock, with a load-balancing loss that mixed expert counts do not break."""
        want_router = self.config.output_router_logits if output_router_logits is None else output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=want_router,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        balance = (
            balancing_loss(outputs.router_logits, self.config.num_experts_per_tok, attention_mask)
            if want_router
            else None
        )
        if loss is not None and balance is not None:
            loss = loss + self.router_aux_loss_coef * balance.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As stock, always under our names: undoing an MXFP4 load, transformers writes the experts of all layers as one tensor."""
        super().save_pretrained(save_directory, *args, **({"save_original_format": False} | kwargs))

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Leaves the masks to `forward`: `generate` would prepare a single one for all windows of a static cache."""
        return attention_mask


def balancing_loss(router_logits: tuple[Tensor, ...], top_k: int, attention_mask: Tensor | None = None) -> Tensor:
    """The Switch loss `experts * sum_e share_e * probability_e`, for any mix of expert counts.

    Stock gpt-oss pools the shares and probabilities of expert e over all layers: so do we while all layers have the same
    number of experts. Otherwise there is no such pool: the loss is that of each layer by itself, averaged over layers.

    Args:
        router_logits: One (B * T, experts of that layer) tensor for each layer.
        top_k: Experts of a token; a layer that has fewer uses them all.
        attention_mask: (B, T), zero where a token is padding and must not count.
    """
    counts = [logits.shape[-1] for logits in router_logits]
    if len(set(counts)) == 1:
        return load_balancing_loss_func(router_logits, counts[0], min(top_k, counts[0]), attention_mask)
    losses = [
        load_balancing_loss_func((x,), n, min(top_k, n), attention_mask)
        for x, n in zip(router_logits, counts, strict=True)
    ]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


class Documents(NamedTuple):
    """Where the documents of a batch lie: what a mask says, in memory linear in the tokens.

    Attributes:
        tokens_DL: For each group of documents of like length, the flat positions (row * T + column) of their tokens; a shorter
            document repeats its last token, to be ignored.
        slots_N: For each token of the batch its slot among all of `tokens_DL` laid end to end; padding has the slot after the last.
    """

    tokens_DL: tuple[Tensor, ...]
    slots_N: Tensor


def sink_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Exact causal attention with sinks in linear memory: the attention function behind `sink_attention`.

    Args:
        module: The attention layer, for its `sinks` (H).
        query: (B, H, T, C); `key` and `value` are (B, G, T, C).
        attention_mask: From `sink_attention_mask`; a tensor means cached keys or a mask of the user's own, and eager attention.
        scaling: Factor on query-key products.
        dropout: On the attention weights; above 0 the CPU has no linear-memory kernel.
        sliding_window: Tokens that a query sees, itself included; None for all.

    Returns:
        The output (B, T, H, C), and None in place of the attention weights (eager attention alone returns them).
    """
    if isinstance(attention_mask, Tensor):
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    if attention_mask is None:
        return _attend(query, key, value, module.sinks, scaling, dropout, sliding_window).transpose(
            1, 2
        ).contiguous(), None
    B, H, T, C = query.shape
    flat = [x.transpose(1, 2).reshape(B * T, -1, C) for x in (query, key, value)]
    outputs = []
    for tokens_DL in attention_mask.tokens_DL:
        q, k, v = (x.index_select(0, tokens_DL.flatten()).unflatten(0, tokens_DL.shape).transpose(1, 2) for x in flat)
        outputs.append(_attend(q, k, v, module.sinks, scaling, dropout, sliding_window).transpose(1, 2).flatten(0, 1))
    padding = query.new_zeros(1, H, C)
    return torch.cat([*outputs, padding]).index_select(0, attention_mask.slots_N).view(B, T, H, C), None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, scale: float, dropout: float, window: int | None
) -> Tensor:
    """Causal attention of D documents of L tokens: q (D, H, L, C), k and v (D, G, L, C) -> (D, H, L, C).

    The sink of a head joins the softmax as one more key, put before the first: its value is 0 and an extra channel, 1 in this
    key and 0 in all others, meets sink / scale in every query. A query in front keeps the causal kernel's diagonal aligned.
    """
    length, channels = q.shape[2:]
    q = torch.cat([q, (sinks_H / scale).to(q.dtype)[None, :, None, None].expand(*q.shape[:3], 1)], dim=-1)
    k, v = pad(k, (0, 1)), pad(v, (0, 1))
    sink_key, sink_value = torch.zeros_like(k[:, :, :1]), torch.zeros_like(v[:, :, :1])
    sink_key[..., -1] = 1
    if window is None or window >= length:
        q, k, v = pad(q, (0, 0, 1, 0)), torch.cat([sink_key, k], dim=2), torch.cat([sink_value, v], dim=2)
        out = scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale, enable_gqa=True)
        return out[:, :, 1:, :channels]
    size = min(max(window, 256), 1024)
    ks, vs, outputs = k.split(size, dim=2), v.split(size, dim=2), []
    for i, block in enumerate(q.split(size, dim=2)):
        first = max(0, i * size - window + 1) // size
        arguments = (block, [sink_key, *ks[first : i + 1]], [sink_value, *vs[first : i + 1]], window, scale, dropout)
        # Several times the keys would be kept for the backward pass if a window spans many blocks: then compute them again.
        outputs.append(
            checkpoint(_attend_block, *arguments, use_reentrant=False) if window > size else _attend_block(*arguments)
        )
    return torch.cat(outputs, dim=2)[..., :channels]


def _attend_block(q: Tensor, ks: list[Tensor], vs: list[Tensor], window: int, scale: float, dropout: float) -> Tensor:
    """Queries (D, H, Q, C + 1) against the sink, ks[0], and the keys of the blocks up to theirs, the last of which ends with them."""
    k, v = torch.cat(ks, dim=2), torch.cat(vs, dim=2)
    age_QK = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None] - torch.arange(
        k.shape[2], device=q.device
    )
    seen_QK = (age_QK >= 0) & (age_QK < window)
    seen_QK[:, 0] = True
    return scaled_dot_product_attention(q, k, v, seen_QK, dropout, scale=scale, enable_gqa=True)


def sink_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Documents | Tensor | None:
    """The mask function behind `sink_attention`: None if all tokens are real and one document a row, else where the documents lie.

    With cached keys it is the eager mask. Tokens are of one document while each may see the one before it.
    """
    if q_length != kv_length:
        return eager_mask(
            batch_size,
            q_length,
            kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            device=device,
            **kwargs,
        )
    row, column = torch.arange(batch_size, device=device)[:, None], torch.arange(1, q_length, device=device)[None]
    joined_BT = mask_function(row, 0, column, column - 1).expand(batch_size, -1)
    ids_BT = 1 + pad((~joined_BT).cumsum(-1), (1, 0))
    ids_BT = ids_BT if attention_mask is None else ids_BT * attention_mask
    return None if bool((ids_BT == 1).all()) else _locate_documents(ids_BT)


def _locate_documents(ids_BT: Tensor) -> Documents:
    """The runs of equal ids, 0 being padding, grouped by powers of two of their length: filling up at most doubles a group."""
    B, T = ids_BT.shape
    rows = torch.arange(B, device=ids_BT.device)[:, None]
    ids, counts = torch.unique_consecutive(torch.where(ids_BT > 0, ids_BT + rows * (T + 1), 0), return_counts=True)
    starts, counts = (counts.cumsum(0) - counts)[ids > 0], counts[ids > 0]
    if len(ids[ids > 0].unique()) < len(starts):
        raise ValueError("attention_mask has padding between real tokens: sink_attention takes it at the ends only; use eager.")
    bits, tokens, used = counts.float().frexp().exponent, [], 0
    slots_N = ids_BT.new_full((B * T,), -1)
    for group in bits.unique():
        start_D, count_D = starts[bits == group, None], counts[bits == group, None]
        offset_L = torch.arange(int(count_D.max()), device=ids_BT.device)
        tokens_DL = start_D + torch.minimum(offset_L, count_D - 1)
        real_DL = offset_L < count_D
        slots_N[tokens_DL[real_DL]] = used + real_DL.flatten().nonzero().flatten()
        tokens.append(tokens_DL)
        used += tokens_DL.numel()
    return Documents(tuple(tokens), slots_N.where(slots_N >= 0, used))


AttentionInterface.register("sink_attention", sink_attention)
AttentionMaskInterface.register("sink_attention", sink_attention_mask)
GptOssPuzzleConfig.register_for_auto_class()  # from here on save_pretrained copies this file and writes auto_map
GptOssPuzzleForCausalLM.register_for_auto_class("AutoModelForCausalLM")
if not __name__.startswith(
    "transformers_modules"
):  # a copy carried by a checkpoint must not displace the installed classes
    AutoConfig.register(GptOssPuzzleConfig.model_type, GptOssPuzzleConfig)
    AutoModelForCausalLM.register(GptOssPuzzleConfig, GptOssPuzzleForCausalLM)
