"""Reads config.json, and refuses what transformers, engines and this package would read differently.

Every stage opens a checkpoint through `read_config`. What a configuration leaves open, or says twice in different
words, is refused, so that the content of the file is what transformers computes with:

- rotary embeddings: `rope_parameters` (transformers 5), or `rope_scaling` with `rope_theta` (before). transformers
  prefers `rope_scaling`, engines do not all, and without either transformers assumes YaRN with factor 32;
- a number under two names: `experts_per_token` and `num_experts_per_tok`;
- `quantization_config`: MXFP4 or none. `lit_puzzle.model.checkpoint` compares it with the stored tensors.

Does not need torch. Reads config.json; writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_puzzle.model.family import family_of, is_child
from lit_puzzle.model.layout import layer_blocks, whole
from lit_puzzle.run.files import read_json

CONFIG_FILE = "config.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")
ROPE_TYPES = ("default", "yarn", "linear", "dynamic", "llama3", "longrope")
SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
ORIGINAL_LENGTH = "original_max_position_embeddings"
FLAGS = ("attention_bias", "tie_word_embeddings")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the checked content of a checkpoint folder's config.json.

    Raises:
        ValueError: the file is missing or damaged, its model belongs to no family, a value is not allowed, or two
            values contradict each other; the message names file and key.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; a checkpoint is a folder with {CONFIG_FILE} and *.safetensors")
    config = read_json(folder / CONFIG_FILE)
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(str(error).replace(CONFIG_FILE, str(folder / CONFIG_FILE), 1)) from error
    return config


def check_config(config: Mapping[str, Any]) -> None:
    """Check the plain dict of a config.json.

    Raises:
        ValueError: a value is not allowed, or two values contradict each other.
    """
    keys = family_of(config).config
    for key in (*SIZES, keys.expert_width, keys.experts_per_token, "max_position_embeddings"):
        whole(config, key)
    for key, other in keys.aliases:
        if config.get(key) is not None and config[key] != config.get(other):
            raise ValueError(f"{CONFIG_FILE}: {key} is {config[key]!r}, but {other} is {config.get(other)!r}")
    blocks = layer_blocks(config)
    chosen, fewest = whole(config, keys.experts_per_token), min(experts for experts, _ in blocks)
    if not is_child(config) and chosen > fewest:  # in a child, a layer with fewer experts uses all of them
        raise ValueError(f"{CONFIG_FILE}: {keys.experts_per_token} is {chosen}, but the layers have {fewest} experts")
    _check_heads(config)
    _check_numbers(config)
    _check_dtypes(config)
    _check_derived(config, blocks)
    rope_parameters(config)


def essentials(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checked configuration makes of the weights, the same for two files that mean the same model.

    Returns:
        Sizes, blocks of the layers, rotary parameters and constants, by their names in transformers.
    """
    keys = family_of(config).config
    return {
        **{key: whole(config, key) for key in (*SIZES, keys.expert_width, keys.experts_per_token)},
        **{key: _stated(config, key, value) for key, value in keys.constants.items()},
        "attention_bias": _stated(config, "attention_bias", keys.attention_bias),
        "tie_word_embeddings": _stated(config, "tie_word_embeddings", False),
        "blocks": [list(block) for block in layer_blocks(config)],
        "rope_parameters": {
            key: value if isinstance(value, str | bool) else float(value)
            for key, value in rope_parameters(config).items()
            if isinstance(value, str | bool | int | float)
        },
    }


def _stated(config: Mapping[str, Any], key: str, default: float | bool) -> float | bool:
    return default if config.get(key) is None else config[key]


def _check_heads(config: Mapping[str, Any]) -> None:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        raise ValueError(
            f"{CONFIG_FILE}: num_attention_heads is {heads}, which num_key_value_heads, {groups}, does not divide"
        )
    if config["head_dim"] % 2:
        raise ValueError(f"{CONFIG_FILE}: head_dim must be even for rotary embeddings, got {config['head_dim']}")


def _check_numbers(config: Mapping[str, Any]) -> None:
    for key in family_of(config).config.constants:
        if config.get(key) is not None:
            _positive(key, config[key])
    for key in FLAGS:
        if not isinstance(config.get(key, False), bool):
            raise ValueError(f"{CONFIG_FILE}: {key} must be true or false, got {config[key]!r}")
    activation = family_of(config).config.activation
    if config.get("hidden_act", activation) != activation:
        raise ValueError(f"{CONFIG_FILE}: hidden_act must be {activation}, got {config['hidden_act']!r}")


def _positive(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{CONFIG_FILE}: {key} must be a finite number above 0, got {value!r}")


def _check_dtypes(config: Mapping[str, Any]) -> None:
    stated = {key: config[key] for key in ("dtype", "torch_dtype") if config.get(key) is not None}
    for key, value in stated.items():
        if str(value).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"{CONFIG_FILE}: {key} must be one of {', '.join(DTYPES)}, got {value!r}")
    if len({str(value).removeprefix("torch.") for value in stated.values()}) > 1:
        raise ValueError(f"{CONFIG_FILE}: dtype is {stated['dtype']}, but torch_dtype is {stated['torch_dtype']}")
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "mxfp4":
        raise ValueError(
            f"{CONFIG_FILE}: quantization_config must have the quant_method mxfp4, got {str(quantization)[:80]}"
        )


def _check_derived(config: Mapping[str, Any], blocks: list[tuple[int, int | None]]) -> None:
    """Refuse a child's `layer_types` that are not those of its blocks: runtimes read one or the other."""
    stated = config.get("layer_types")
    derived = ["full_attention" if window is None else "sliding_attention" for _, window in blocks]
    if is_child(config) and stated not in (None, derived):
        raise ValueError(f"{CONFIG_FILE}: layer_types is {stated!r}, but block_configs means {derived}")


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of rotary embeddings as one mapping, from old or new entries of a config.json.

    Raises:
        ValueError: there are none, they contradict each other, or a value is not allowed.
    """
    given = {key: _rope(config, key) for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    if not given:
        raise ValueError(
            f"{CONFIG_FILE}: rope_parameters is missing (as is rope_scaling): runtimes would assume different ones. "
            'Give {"rope_type": "default", "rope_theta": ...} if positions are not scaled'
        )
    first = next(iter(given.values()))
    if any(rope != first for rope in given.values()):
        raise ValueError(
            f"{CONFIG_FILE}: rope_scaling means {given['rope_scaling']}, but rope_parameters means "
            f"{given['rope_parameters']}; remove one of them"
        )
    return first


def _rope(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(config[key], Mapping) or any(isinstance(value, Mapping) for value in config[key].values()):
        raise ValueError(f"{CONFIG_FILE}: {key} must be one object of values, got {str(config[key])[:80]}")
    rope = dict(config[key])
    kind = rope.pop("type", None)  # the name of `rope_type` before transformers 4.43
    rope.setdefault("rope_type", kind or "default")
    if kind not in (None, rope["rope_type"]) or rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"{CONFIG_FILE}: rope_type of {key} must be one of {', '.join(ROPE_TYPES)}, got {config[key]}")
    theta = config.get("rope_theta")
    rope.setdefault("rope_theta", family_of(config).config.rope_theta if theta is None else theta)
    for name in ("rope_theta", ORIGINAL_LENGTH):  # transformers prefers the former inside, the latter beside
        if name in rope and config.get(name) not in (None, rope[name]):
            raise ValueError(f"{CONFIG_FILE}: {name} is {config[name]!r}, but {key} has {rope[name]!r}")
    required = ("factor", ORIGINAL_LENGTH) if rope["rope_type"] == "yarn" else ()
    for name in ("rope_theta", *required, *({"factor"} & rope.keys())):
        _positive(f"{name} of {key}", rope.get(name))
    return rope
