"""config.json of an exported folder: a child's, or that of the stock architecture where it can represent the child.

`block_configs` is the only source of a child's layers; `layer_types` is derived from it and `per_layer_config` is never
written. YaRN parameters are written under `rope_parameters`, as transformers 5 does; a stock config has `rope_scaling`
and `rope_theta` instead, which old and new runtimes read. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_puzzle.child.child import child_config
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import family_of, is_child
from lit_puzzle.model.layout import layer_prefix
from lit_puzzle.model.opening import load_config
from lit_puzzle.model.rope import rope_parameters

Blocks = Sequence[tuple[int, int | None]]  # number of experts and window of every layer

ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")
PUZZLE_KEYS = ("block_configs", "auto_map", "per_layer_config", "allow_global_per_layer_attribute_access")
SECOND_TOP_K = "experts_per_token"  # the released gpt-oss checkpoints state the number twice
# transformers downloads and runs what these entries name: kernels, and pipelines of other repositories.
CODE_KEYS = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "custom_pipelines"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)


def puzzle_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a child's config.json for a checkpoint of either model type, without entries that name foreign code.

    Raises:
        ValueError: the checkpoint's config.json contradicts itself (`per_layer_config` and `block_configs` differ).
    """
    if is_child(checkpoint.config):
        load_config(checkpoint.folder)
    config = child_config(checkpoint.config, checkpoint.blocks)
    return {**_without(config, (*ROPE_KEYS, *CODE_KEYS)), "rope_parameters": rope_parameters(checkpoint.config)}


def stock_config(config: Mapping[str, Any], experts: int, blocks: Blocks) -> dict[str, Any]:
    """Return the config.json of the stock architecture for a child's.

    Args:
        config: config.json of the child.
        experts: number of experts in every layer.
        blocks: blocks of the child, whose windows are all of one size.
    """
    family = family_of(config)
    keys = family.config
    windows = [window for _, window in blocks if window is not None]
    rope = dict(config["rope_parameters"])
    theta = rope.pop("rope_theta")
    top_k = {key: min(config[key], experts) for key in (keys.experts_per_token, SECOND_TOP_K) if key in config}
    return {
        **_without(config, (*PUZZLE_KEYS, "rope_parameters")),
        "model_type": family.model_type,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]],
        keys.num_experts: experts,
        **top_k,  # in a child, a layer with fewer experts uses all of them
        keys.window: windows[0] if windows else config.get(keys.window, 128),
        "rope_scaling": rope,
        "rope_theta": theta,
    }


def with_storage(config: Mapping[str, Any], packed: frozenset[int], num_layers: int, dtype: str) -> dict[str, Any]:
    """Return the config with its entries about storage.

    Args:
        config: config.json of the exported folder.
        packed: layers whose experts are stored in MXFP4.
        num_layers: number of layers.
        dtype: dtype of everything else.
    """
    names = family_of(config).layer
    plain = [f"{layer_prefix(layer)}{names.experts}" for layer in range(num_layers) if layer not in packed]
    result = {**_without(config, ("quantization_config", "torch_dtype")), "dtype": dtype}
    if packed:
        other = [f"model.layers.*.{names.attention}", f"model.layers.*.{names.router}", "model.embed_tokens", "lm_head"]
        result["quantization_config"] = {"modules_to_not_convert": [*other, *plain], "quant_method": "mxfp4"}
    return result


def _without(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}
