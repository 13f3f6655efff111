"""Names and shapes of all tensors that a configuration implies, without torch.

Works on the plain dict of a `config.json`, of a parent or a child. Weights of experts come in two layouts: plain (bf16,
fp16, fp32) and MXFP4 (4-bit values in blocks of 32 with one scale each), chosen layer by layer.

Source: the tensor names are those of transformers' gpt-oss and of the released gpt-oss checkpoints;
arXiv 2602.11937 for the counts.
Shape legend: E experts, H hidden, I intermediate, V vocabulary, Q query heads x head_dim, K key-value heads x
head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from lit_puzzle.model.family import family_of, is_child

Shape = tuple[int, ...]

MAX_WHOLE, MAX_LAYERS = 2**31 - 1, 10_000  # larger ones are mistakes, which would fill the memory
MXFP4_BLOCK = 32  # values that share one scale; a block is 16 bytes


def layer_prefix(layer: int) -> str:
    """Return the prefix of the names of a layer's tensors."""
    return f"model.layers.{layer}."


def whole(config: Mapping[str, Any], key: str) -> int:
    """Return a positive whole number of the configuration, below 2^31.

    Raises:
        ValueError: it is missing or no such number.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_WHOLE:
        raise ValueError(f"config.json: {key} must be a positive whole number below 2^31, got {repr(value)[:40]}")
    return value


def layer_blocks(config: Mapping[str, Any]) -> list[tuple[int, int | None]]:
    """Return the number of experts and the window of every layer.

    Returns:
        One (number of experts, window in tokens or None for full attention) per layer.

    Raises:
        ValueError: the model type belongs to no family, or a list does not have one entry per layer.
    """
    layers, keys = whole(config, "num_hidden_layers"), family_of(config).config
    if layers > MAX_LAYERS:
        raise ValueError(f"config.json: num_hidden_layers must be at most {MAX_LAYERS:,}, got {layers}")
    if is_child(config):
        blocks = config.get("block_configs")
        if not isinstance(blocks, list) or len(blocks) != layers:
            raise ValueError(
                f"config.json: block_configs must list {layers} layers (num_hidden_layers), got {blocks!r}"
            )
        return [_puzzle_block(layer, block) for layer, block in enumerate(blocks)]
    kinds = config.get("layer_types") or [keys.layer_types[i % len(keys.layer_types)] for i in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"config.json: layer_types must list {layers} times (num_hidden_layers) full_attention or "
            f"sliding_attention, got {kinds!r}"
        )
    experts = whole(config, keys.num_experts)
    window = whole(config, keys.window) if "sliding_attention" in kinds else None
    return [(experts, window if kind == "sliding_attention" else None) for kind in kinds]


def _puzzle_block(layer: int, block: object) -> tuple[int, int | None]:
    if not isinstance(block, Mapping):
        raise ValueError(f"config.json: block_configs[{layer}] must be an object, got {block!r}")
    try:
        window = None if block.get("sliding_window") is None else whole(block, "sliding_window")
        return whole(block, "num_local_experts"), window
    except ValueError as error:
        raise ValueError(f"block_configs[{layer}] of {error}") from error


def layer_shapes(config: Mapping[str, Any], num_experts: int, mxfp4: bool) -> dict[str, Shape]:
    """Return the shapes of a decoder layer's tensors by their name inside the layer, without the KV scales.

    Args:
        config: the plain dict of a `config.json`.
        num_experts: experts of the layer.
        mxfp4: whether its experts are stored as MXFP4.
    """
    family = family_of(config)
    names, hidden, inner = family.layer, whole(config, "hidden_size"), whole(config, family.config.expert_width)
    heads, head_dim = whole(config, "num_attention_heads"), whole(config, "head_dim")
    queries, keys = heads * head_dim, whole(config, "num_key_value_heads") * head_dim
    shapes: dict[str, Shape] = {f"{norm}.weight": (hidden,) for norm in (names.attention_norm, names.moe_norm)}
    sizes = ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries))
    for projection, (rows, columns) in zip(names.projections, sizes, strict=True):
        shapes[f"{names.attention}.{projection}.weight"] = (rows, columns)
        if config.get("attention_bias", family.config.attention_bias):
            shapes[f"{names.attention}.{projection}.bias"] = (rows,)
    shapes[f"{names.attention}.sinks"] = (heads,)
    shapes[f"{names.router}.weight"] = (num_experts, hidden)
    shapes[f"{names.router}.bias"] = (num_experts,)
    matrix_sizes = ((2 * inner, hidden), (hidden, inner))
    for matrix, (rows, columns) in zip(names.expert_matrices, matrix_sizes, strict=True):
        shapes |= _expert_shapes(f"{names.experts}.{matrix}", num_experts, rows, columns, mxfp4)
    return shapes


def _expert_shapes(name: str, num_experts: int, rows: int, columns: int, mxfp4: bool) -> dict[str, Shape]:
    """Return the shapes of an expert matrix [E, rows, columns]: transposed if plain, packed rows if MXFP4."""
    bias = {f"{name}_bias": (num_experts, rows)}
    if not mxfp4:
        return {name: (num_experts, columns, rows), **bias}
    if columns % MXFP4_BLOCK:
        raise ValueError(f"MXFP4 experts need rows that divide by {MXFP4_BLOCK}; {name} has rows of {columns} values")
    groups = (num_experts, rows, columns // MXFP4_BLOCK)
    return {f"{name}_blocks": (*groups, MXFP4_BLOCK // 2), f"{name}_scales": groups, **bias}


def tensor_shapes(config: Mapping[str, Any], mxfp4_layers: Collection[int] = ()) -> dict[str, Shape]:
    """Return the shapes of all tensors of a checkpoint: embedding, layer by layer, norm, head.

    Args:
        config: the plain dict of a `config.json`.
        mxfp4_layers: layers whose experts are stored as MXFP4.
    """
    hidden, vocabulary = whole(config, "hidden_size"), whole(config, "vocab_size")
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer, (num_experts, _) in enumerate(layer_blocks(config)):
        inside = layer_shapes(config, num_experts, layer in mxfp4_layers)
        shapes |= {layer_prefix(layer) + name: shape for name, shape in inside.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def count_parameters(config: Mapping[str, Any]) -> int:
    """Return the number of parameters, whatever their storage (an MXFP4 value counts once, scales do not count)."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def kv_values(config: Mapping[str, Any], context_tokens: int) -> int:
    """Return how many numbers the KV cache of one sequence holds; a windowed layer keeps at most its window.

    Returns:
        sum over layers of 2 x key-value heads x head_dim x min(context, window).
    """
    per_token = 2 * whole(config, "num_key_value_heads") * whole(config, "head_dim")
    return per_token * sum(min(context_tokens, window or context_tokens) for _, window in layer_blocks(config))
