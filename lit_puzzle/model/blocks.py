"""Models whose layers each have a block of their own in the configuration, so that one of them can be changed.

Reads and writes nothing; weights are not copied. Source: arXiv 2602.11937 section 2 (experts and windows per layer).
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, TypeAlias

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lit_puzzle.model.family import FAMILIES, Family, family_named, family_of
from lit_puzzle.model.layout import layer_blocks

PuzzleConfig: TypeAlias = PreTrainedConfig  # the configuration of a PuzzleModel, with `block_configs`
PuzzleModel: TypeAlias = PreTrainedModel  # a causal language model as `with_own_blocks` returns it, of any family
BlockConfig = dict[str, int | None]  # {"num_local_experts": int, "sliding_window": int or None}

for _family in FAMILIES:  # a modeling file registers its classes with transformers when it is imported
    import_module(f"{__package__}.{_family.child.modeling_file.stem}")


def config_class(family: Family) -> Any:
    """Return the class of the configuration of a family's children."""
    return CONFIG_MAPPING[family.child.model_type]


def model_class(family: Family) -> Any:
    """Return the class of the causal language model of a family's children."""
    return AutoModelForCausalLM._model_mapping[config_class(family)]


def build_layer(config: PuzzleConfig, index: int) -> Any:
    """Return a new decoder layer, made as `block_configs[index]` of a child's configuration says."""
    return model_class(family_named(config.model_type)).body_class.build_layer(config, index)


def build_rotary_embedding(config: PuzzleConfig) -> Any:
    """Return a new module that turns positions into rotations, of a child's configuration."""
    return model_class(family_named(config.model_type)).body_class.build_rotary_embedding(config)


def block_config(num_experts: int, window: int | None) -> BlockConfig:
    """Return one entry of `block_configs`."""
    return {"num_local_experts": num_experts, "sliding_window": window}


def puzzle_config(config: Mapping[str, Any], blocks: Sequence[BlockConfig], **settings: Any) -> PuzzleConfig:
    """Return the configuration of a model with other layers.

    Args:
        config: the plain dict of a `config.json`, a parent's or a child's.
        blocks: one entry for each layer of the new model.
        **settings: other entries that replace those of `config`, such as `attn_implementation`.
    """
    family = family_of(config)
    replaced = {*family.child.config_entries(), "block_configs", "layer_types", "num_hidden_layers"}
    kept = {name: value for name, value in config.items() if name not in replaced}
    return config_class(family)(**kept | settings, num_hidden_layers=len(blocks), block_configs=list(blocks))


def with_own_blocks(model: PreTrainedModel) -> PuzzleModel:
    """Return the same modules as a model whose layers have a block each in the configuration.

    A model of that kind is returned unchanged; the modules of a stock model move, nothing is copied.
    """
    stock = model.config.to_dict()
    family = family_of(stock)
    if model.config.model_type == family.child.model_type:
        return model
    blocks = [block_config(experts, window) for experts, window in layer_blocks(stock)]
    config = config_class(family).from_parent(model.config, blocks)
    with torch.device("meta"):
        puzzle = model_class(family)(config)
    puzzle.model.embed_tokens, puzzle.model.norm = model.model.embed_tokens, model.model.norm
    puzzle.model.rotary_emb, puzzle.model.layers = model.model.rotary_emb, model.model.layers
    puzzle.lm_head = model.lm_head
    for decoder in puzzle.model.layers:
        puzzle.model.share_config(decoder, puzzle.config)
    puzzle.generation_config = model.generation_config
    return puzzle.train(model.training)


def set_blocks(config: PuzzleConfig, blocks: list[BlockConfig]) -> None:
    """Give a configuration other blocks, in place: the object is shared by all layers and by `generate`."""
    config.block_configs = blocks
    config.layer_types = [
        "full_attention" if block["sliding_window"] is None else "sliding_attention" for block in blocks
    ]
    config.per_layer_config = dict(enumerate(blocks))
