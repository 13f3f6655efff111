"""A gpt-oss model with heterogeneous layers: each has its own number of experts and its own attention window.

Reads and writes Hugging Face folders with `model_type: gpt_oss_puzzle`; tensor names are those of stock gpt-oss. Every
saved folder contains a copy of this file, so it imports only torch, transformers and the standard library. Importing it
registers the classes. Source: arXiv 2602.11937 (the search space and the released model).

Shapes: B batch, T tokens, E embedding channels, V vocabulary.
"""

from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GptOssConfig,
    GptOssForCausalLM,
    GptOssModel,
    GptOssPreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssDecoderLayer,
    GptOssRMSNorm,
    GptOssRotaryEmbedding,
    load_balancing_loss_func,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

Block = dict[str, int | None]
BLOCK_KEYS = {"num_local_experts", "sliding_window"}
DERIVED_KEYS = {"per_layer_config", "allow_global_per_layer_attribute_access"}  # of a configuration: never written


class GptOssPuzzleConfig(GptOssConfig):
    """The configuration of a heterogeneous gpt-oss model, whose layers are defined by `block_configs` alone.

    `block_configs` is a list of `{"num_local_experts": int, "sliding_window": int | None}`, one for each layer.
    `layer_types` and transformers' `per_layer_config` (which sizes each layer's KV cache) are derived from it, and a
    file in which they disagree is refused. The model-wide `num_local_experts` and `sliding_window` are used only where
    `block_configs` is missing.

    Raises:
        ValueError: `block_configs` does not have one valid entry per layer (the message names the layer), or
            `per_layer_config` or `layer_types` contradict it.
    """

    model_type = "gpt_oss_puzzle"
    block_configs: list[Block] = None  # type: ignore[assignment]  # None until __post_init__
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the blocks and derive from them the entries that transformers reads."""
        sparse, layer_types = kwargs.pop("per_layer_config", None), self.layer_types
        if sparse is not None or self.block_configs is None:
            blocks = self._blocks_of(sparse or {})
            if self.block_configs not in (None, blocks):
                raise ValueError(
                    f"per_layer_config means {blocks}, but block_configs is {self.block_configs}: remove the former."
                )
            self.block_configs = blocks
        _check_blocks(self.block_configs, self.num_hidden_layers)
        self.layer_types = [_layer_type(block["sliding_window"]) for block in self.block_configs]
        if layer_types not in (None, self.layer_types):
            raise ValueError(f"layer_types is {layer_types}, but block_configs means {self.layer_types}: remove it.")
        super().__post_init__(**kwargs)
        self.per_layer_config = dict(enumerate(self.block_configs))
        self.allow_global_per_layer_attribute_access = True  # stock code reads the model-wide values and would fail

    def _blocks_of(self, sparse: dict[int | str, dict[str, Any]]) -> list[Block]:
        """Return the blocks of a `per_layer_config`; the default is stock gpt-oss (even layers windowed)."""
        types = self.layer_types or [
            _layer_type(None if i % 2 else self.sliding_window) for i in range(self.num_hidden_layers)
        ]
        blocks = []
        for i, layer_type in enumerate(types):
            window = self.sliding_window if layer_type == "sliding_attention" else None
            blocks.append({"num_local_experts": self.num_local_experts, "sliding_window": window})
            for overrides in (value for layer, value in sparse.items() if int(layer) == i):
                blocks[i] |= overrides
        return blocks

    @classmethod
    def from_parent(cls, config: GptOssConfig, block_configs: list[Block]) -> Self:
        """Return the configuration of a child of the model of `config`, with the layers of `block_configs`."""
        replaced = {"model_type", "architectures", "layer_types", "block_configs", "auto_map"}
        settings = {name: value for name, value in config.to_dict().items() if name not in replaced}
        settings["attn_implementation"] = config._attn_implementation
        settings["experts_implementation"] = config._experts_implementation
        return cls(**settings, block_configs=block_configs, architectures=["GptOssPuzzleForCausalLM"])

    def get_gpt_oss_config_for_layer(self, layer_idx: int) -> GptOssConfig:
        """Return a stock configuration with the layer's block; with fewer experts than top-k it routes to them all."""
        block = self.block_configs[layer_idx]
        settings = {field.name: vars(self)[field.name] for field in fields(GptOssConfig)} | block
        settings["num_experts_per_tok"] = min(self.num_experts_per_tok, block["num_local_experts"])
        return GptOssConfig(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the stock dictionary without the derived entries."""
        return {name: value for name, value in super().to_dict().items() if name not in DERIVED_KEYS}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the stock dictionary for config.json without the derived entries."""
        return {name: value for name, value in super().to_diff_dict().items() if name not in DERIVED_KEYS}


def _layer_type(window: int | None) -> str:
    return "full_attention" if window is None else "sliding_attention"


def _check_blocks(blocks: list[Block], num_layers: int) -> None:
    if len(blocks) != num_layers:
        raise ValueError(
            f"block_configs has {len(blocks)} entries and num_hidden_layers is {num_layers}: they must match."
        )
    for i, block in enumerate(blocks):
        if set(block) != BLOCK_KEYS:
            raise ValueError(f"block_configs[{i}] has the keys {sorted(block)}: give {sorted(BLOCK_KEYS)}.")
        experts, window = block["num_local_experts"], block["sliding_window"]
        if type(experts) is not int or experts < 1:
            raise ValueError(f"block_configs[{i}] has num_local_experts={experts!r}: give an integer of at least 1.")
        if window is not None and (type(window) is not int or window < 2):
            raise ValueError(
                f"block_configs[{i}] has sliding_window={window!r}: give an integer of at least 2, or null."
            )


class GptOssPuzzleModel(GptOssModel):
    """The decoder: stock gpt-oss layers, each built from its own configuration, and one mask per window."""

    config: GptOssPuzzleConfig
    _can_set_experts_implementation_cached_value = True  # transformers would look for its decorator in this file

    def __init__(self, config: GptOssPuzzleConfig) -> None:
        GptOssPreTrainedModel.__init__(self, config)  # not that of GptOssModel, which would build equal layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(self.build_layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = GptOssRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = self.build_rotary_embedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def build_layer(cls, config: GptOssPuzzleConfig, index: int) -> GptOssDecoderLayer:
        """Return a new decoder layer, made as `block_configs[index]` says."""
        return cls.share_config(GptOssDecoderLayer(config.get_gpt_oss_config_for_layer(index), index), config)

    @staticmethod
    def build_rotary_embedding(config: GptOssPuzzleConfig) -> GptOssRotaryEmbedding:
        """Return a new module that turns positions into rotations."""
        return GptOssRotaryEmbedding(config=config)

    @staticmethod
    def share_config(layer: GptOssDecoderLayer, config: GptOssPuzzleConfig) -> GptOssDecoderLayer:
        """Give a layer the model's own configuration object, so that `set_attn_implementation` reaches the layer."""
        layer.self_attn.config = layer.mlp.experts.config = config
        return layer

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
        """Run the stock forward pass; where `position_ids` restart, a new packed document begins, unseen by others."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        hidden_BTE = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        masks = self.attention_masks(hidden_BTE, attention_mask, past_key_values, position_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden_BTE.shape[1], device=hidden_BTE.device) + seen)[None]
        position_embeddings = self.rotary_emb(hidden_BTE, position_ids)
        for layer, block in zip(self.layers, self.config.block_configs, strict=True):
            hidden_BTE = layer(
                hidden_BTE,
                attention_mask=masks[block["sliding_window"]],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_BTE), past_key_values=past_key_values)

    def attention_masks(
        self, hidden_BTE: Tensor, mask: Any, cache: Cache | None, positions: Tensor | None
    ) -> dict[int | None, Any]:
        """Return the mask of each window, by the configuration and the cache of the first layer that has it."""
        masks: dict[int | None, Any] = {}
        for i, window in enumerate(block["sliding_window"] for block in self.config.block_configs):
            if window not in masks:
                create = create_causal_mask if window is None else create_sliding_window_causal_mask
                masks[window] = create(self.config.per_layer_config[i], hidden_BTE, mask, cache, positions, layer_idx=i)
        return masks


class GptOssPuzzleForCausalLM(GptOssForCausalLM):
    """The causal language model. Names of parameters are those of stock `GptOssForCausalLM`."""

    config: GptOssPuzzleConfig
    body_class: ClassVar[type[GptOssPuzzleModel]] = GptOssPuzzleModel
    _can_set_experts_implementation_cached_value = True
    # Scales of an FP8 KV cache are in the same files; only the serving engine reads them.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"self_attn\.[kv]_scale$"]

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
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run the stock forward pass, with `balancing_loss` as auxiliary loss; `kwargs` go to decoder and loss."""
        with_router = self.config.output_router_logits if output_router_logits is None else output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_router_logits=with_router,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None if labels is None else self.loss_function(logits_BTV, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if with_router:
            aux_loss = balancing_loss(outputs.router_logits, self.config.num_experts_per_tok, attention_mask)
            loss = None if loss is None else loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save under the model's own names: with MXFP4 weights loaded, transformers would give all layers one name."""
        super().save_pretrained(save_directory, **{"save_original_format": False} | kwargs)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Leave the masks to `forward`: with a static cache `generate` would make one for all windows."""
        return attention_mask


def balancing_loss(router_logits: tuple[Tensor, ...], top_k: int, attention_mask: Tensor | None = None) -> Tensor:
    """Return the Switch loss: experts * sum over e of (share of the tokens routed to e) * (mean probability of e).

    Where all layers have the same number of experts, expert e is pooled over the layers, as in stock gpt-oss. Otherwise
    the loss of each layer is computed with its own number of experts and averaged over the layers.

    Args:
        router_logits: for each layer (B * T, its experts).
        top_k: experts per token; a layer that has fewer uses them all.
        attention_mask: (B, T), 0 for padding, which is not counted.
    """
    counts = [logits.shape[-1] for logits in router_logits]
    if len(set(counts)) == 1:
        return load_balancing_loss_func(router_logits, counts[0], min(top_k, counts[0]), attention_mask)
    layers = zip(router_logits, counts, strict=True)
    losses = [load_balancing_loss_func((logits,), n, min(top_k, n), attention_mask) for logits, n in layers]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


GptOssPuzzleConfig.register_for_auto_class()  # now save_pretrained copies this file and writes auto_map
GptOssPuzzleForCausalLM.register_for_auto_class("AutoModelForCausalLM")
if not __name__.startswith("transformers_modules"):  # a copy in a checkpoint must not replace the installed classes
    AutoConfig.register(GptOssPuzzleConfig.model_type, GptOssPuzzleConfig)
    AutoModelForCausalLM.register(GptOssPuzzleConfig, GptOssPuzzleForCausalLM)
