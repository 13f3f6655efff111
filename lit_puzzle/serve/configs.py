"""config.json of an exported folder: the heterogeneous child's, or that of plain gpt-oss where it can say the same.

`block_configs` is the only truth of a child; `layer_types` follows from it and `per_layer_config` is never written.
YaRN parameters stand under `rope_parameters`, as transformers 5 writes them; plain gpt-oss keeps `rope_scaling` and
`rope_theta` of the released gpt-oss checkpoints, which old and new runtimes read. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_puzzle.child.child import child_config
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig
from lit_puzzle.model.layout import layer_prefix

Blocks = Sequence[tuple[int, int | None]]  # of every layer: experts, window

NOT_MXFP4 = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")
PUZZLE_KEYS = ("block_configs", "auto_map", "per_layer_config", "allow_global_per_layer_attribute_access")
TOP_K_KEYS = ("num_experts_per_tok", "experts_per_token")  # the released gpt-oss checkpoints state both
# transformers fetches and runs what these name: kernels, and pipelines of other repositories.
CODE_KEYS = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "custom_pipelines"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)


def puzzle_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """A child's config.json for a checkpoint, whose own may be older or stock, without what names code of others.

    Raises:
        ValueError: The checkpoint's own contradicts itself (a `per_layer_config` that is not its `block_configs`).
    """
    if checkpoint.config["model_type"] == GptOssPuzzleConfig.model_type:
        GptOssPuzzleConfig.from_pretrained(checkpoint.folder)
    config = child_config(checkpoint.config, checkpoint.blocks)
    return {**_without(config, (*ROPE_KEYS, *CODE_KEYS)), "rope_parameters": rope_parameters(checkpoint.config)}


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of rotary embeddings in one place, from either dialect.

    Raises:
        ValueError: YaRN parameters without a factor above 0 or without the original length.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", GptOssPuzzleConfig.default_theta))
    if rope["rope_type"] == "yarn":
        for key in ("factor", "original_max_position_embeddings"):
            value = rope.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"config.json: YaRN needs {key} above 0; its rope parameters are {rope}")
    return rope


def stock_config(config: Mapping[str, Any], experts: int, blocks: Blocks) -> dict[str, Any]:
    """A plain gpt-oss config.json for a child's, with one number of experts and one window for all windowed layers."""
    windows = [window for _, window in blocks if window is not None]
    rope = dict(config["rope_parameters"])
    theta = rope.pop("rope_theta")
    top_k = {key: min(config[key], experts) for key in TOP_K_KEYS if key in config}  # a child takes all that it has
    return {
        **_without(config, (*PUZZLE_KEYS, "rope_parameters")),
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": experts,
        **top_k,
        "sliding_window": windows[0] if windows else config.get("sliding_window", 128),
        "rope_scaling": rope,
        "rope_theta": theta,
    }


def with_storage(config: Mapping[str, Any], packed: frozenset[int], num_layers: int, dtype: str) -> dict[str, Any]:
    """The config with what it says of the files: which experts are MXFP4, and the dtype of everything else."""
    plain = [f"{layer_prefix(layer)}mlp.experts" for layer in range(num_layers) if layer not in packed]
    result = {**_without(config, ("quantization_config", "torch_dtype")), "dtype": dtype}
    if packed:
        result["quantization_config"] = {
            "modules_to_not_convert": [*NOT_MXFP4, *plain],
            "quant_method": "mxfp4",
        }
    return result


def _without(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}
