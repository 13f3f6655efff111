"""Reads the parameters of rotary embeddings from config.json, in either of their dialects, and checks them.

`rope_parameters` (transformers 5), or `rope_scaling` with `rope_theta` (before). transformers prefers `rope_scaling`,
engines do not all, and without either transformers assumes YaRN with factor 32. Two that mean different things, and
values with which transformers would fail in the first pass, are refused. Does not need torch. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_puzzle.model.family import family_of

ORIGINAL_LENGTH = "original_max_position_embeddings"
REQUIRED = {  # numbers that each type of scaling needs
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", ORIGINAL_LENGTH),
    "llama3": ("factor", ORIGINAL_LENGTH, "low_freq_factor", "high_freq_factor"),
}
OPTIONAL = ("factor", ORIGINAL_LENGTH, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
LARGEST = 1e30  # of any number: float32 ends at 3e38, and transformers multiplies some


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of rotary embeddings as one mapping, from old or new entries of a config.json.

    Raises:
        ValueError: there are none, they contradict each other, or a value is not allowed.
    """
    given = {key: _read(config, key) for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    if not given:
        raise ValueError(
            "config.json: rope_parameters is missing (as is rope_scaling): runtimes would assume different ones. "
            'Give {"rope_type": "default", "rope_theta": ...} if positions are not scaled'
        )
    first = next(iter(given.values()))
    if any(rope != first for rope in given.values()):
        raise ValueError(
            f"config.json: rope_scaling means {given['rope_scaling']}, but rope_parameters means "
            f"{given['rope_parameters']}; remove one of them"
        )
    return first


def _read(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(config[key], Mapping) or any(isinstance(value, Mapping) for value in config[key].values()):
        raise ValueError(f"config.json: {key} must be one object of values, got {str(config[key])[:80]}")
    rope = dict(config[key])
    kind = rope.pop("type", None)  # the name of `rope_type` before transformers 4.43
    rope.setdefault("rope_type", kind or "default")
    if kind not in (None, rope["rope_type"]) or str(rope["rope_type"]) not in REQUIRED:
        raise ValueError(f"config.json: rope_type of {key} must be one of {', '.join(REQUIRED)}, got {config[key]}")
    theta = config.get("rope_theta")
    rope.setdefault("rope_theta", family_of(config).config.rope_theta if theta is None else theta)
    for name in ("rope_theta", ORIGINAL_LENGTH):  # transformers prefers the former inside, the latter beside
        if name in rope and config.get(name) not in (None, rope[name]):
            raise ValueError(f"config.json: {name} is {config[name]!r}, but {key} has {rope[name]!r}")
    _check_values(rope, key)
    return rope


def _check_values(rope: Mapping[str, Any], key: str) -> None:
    required = ("rope_theta", *REQUIRED[rope["rope_type"]])
    for name in (*required, *(name for name in OPTIONAL if rope.get(name) is not None and name not in required)):
        check_positive(f"{name} of {key}", rope.get(name))
    if not isinstance(rope.get("truncate", True), bool):
        raise ValueError(f"config.json: truncate of {key} must be true or false, got {rope['truncate']!r}")
    if rope.get("partial_rotary_factor", 1) != 1:
        share = rope["partial_rotary_factor"]
        raise ValueError(f"config.json: partial_rotary_factor of {key} must be 1 in this family, got {share!r}")


def check_positive(key: str, value: object) -> None:
    """Refuse what is no finite number above 0 that float32 can hold.

    Raises:
        ValueError: names the key.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
        raise ValueError(f"config.json: {key} must be a finite number above 0 (at most 1e30), got {value!r}")
