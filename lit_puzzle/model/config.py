"""Reads config.json, and refuses what transformers, engines and this package would read differently.

Every stage opens a checkpoint through `read_config`. What a configuration leaves open, or says twice in different
words, is refused, so that the content of the file is what transformers computes with:

- rotary embeddings, which have two dialects (`lit_puzzle.model.rope`);
- a number under two names: `experts_per_token` and `num_experts_per_tok`;
- `quantization_config`: MXFP4 or none. `lit_puzzle.model.checkpoint` compares it with the stored tensors;
- keys by which transformers would return or compute something else than the stages expect (`NEUTRAL`).

Does not need torch. Reads config.json; writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_puzzle.model.family import family_of, is_child
from lit_puzzle.model.layout import layer_blocks, whole
from lit_puzzle.model.rope import check_positive, rope_parameters
from lit_puzzle.run.files import read_json

CONFIG_FILE = "config.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")
SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
FLAGS = ("attention_bias", "tie_word_embeddings")
NEUTRAL: dict[str, bool | int] = {  # the only value of each key with which a model computes what the stages expect
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "attention_dropout": 0,  # training would use it: what trains how is said by the recipe
    "partial_rotary_factor": 1,
}
MAX_LABELS = 1 << 16  # transformers makes a name for each


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
    _check_neutral(config)
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
            key: value if isinstance(value, str | bool | list) else float(value)
            for key, value in rope_parameters(config).items()
            if isinstance(value, str | bool | int | float | list)
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
            check_positive(key, config[key])
    for key in FLAGS:
        if not isinstance(config.get(key, False), bool):
            raise ValueError(f"{CONFIG_FILE}: {key} must be true or false, got {config[key]!r}")
    activation = family_of(config).config.activation
    if config.get("hidden_act", activation) != activation:
        raise ValueError(f"{CONFIG_FILE}: hidden_act must be {activation}, got {config['hidden_act']!r}")


def _check_neutral(config: Mapping[str, Any]) -> None:
    for key, allowed in NEUTRAL.items():
        if config.get(key) is not None and config[key] != allowed:
            raise ValueError(
                f"{CONFIG_FILE}: {key} must be {json.dumps(allowed)}, got {config[key]!r}: models of this family are "
                "computed with that value. Remove the key"
            )
    if config.get("num_labels") is not None and whole(config, "num_labels") > MAX_LABELS:
        raise ValueError(f"{CONFIG_FILE}: num_labels is {config['num_labels']}; at most {MAX_LABELS} are read")
    padding = config.get("pad_token_id")
    if padding is not None and not (type(padding) is int and 0 <= padding < config["vocab_size"]):
        raise ValueError(
            f"{CONFIG_FILE}: pad_token_id must be a token of the vocabulary of {config['vocab_size']}, got {padding!r}"
        )


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
