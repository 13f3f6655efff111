"""Bytes of a model before it exists: weights, KV cache, logits, and what its layers hold while they run.

Everything follows from the plain dict of a `config.json`. Pure functions; imports no torch; reads and writes nothing.

    weights        parameters x bytes
    KV cache       rows x 2 K b x sum over layers of min(tokens, window)
    activations    tokens x (d D + i k I + o k D + q Q + v K + e E + c), with the numbers of `ACTIVATIONS`

The numbers are in `lit_puzzle.model.activation_bytes`.

Legend: D hidden, I inside an expert, k experts of a token, Q query heads x head_dim, K key-value heads x head_dim, E
experts of a layer, b bytes of a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_puzzle.model.activation_bytes import ACTIVATIONS, Held
from lit_puzzle.model.family import family_of
from lit_puzzle.model.layout import layer_blocks, layer_shapes, whole

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "32-true": 4, "bf16-true": 2, "16-true": 2}
CHECKPOINT_STATES = 6  # states of a layer more than without checkpointing, while its forward pass is run again


@dataclass(frozen=True)
class LayerSize:
    """One layer.

    Attributes:
        experts: number of its experts.
        window: tokens that its attention sees; None: all.
        attention: parameters of attention and norms.
        router: parameters of the router.
        expert: parameters of all its experts.
    """

    experts: int
    window: int | None
    attention: int
    router: int
    expert: int

    @property
    def parameters(self) -> int:
        """All parameters of the layer."""
        return self.attention + self.router + self.expert


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that its memory depends on.

    Attributes:
        config: the `config.json` that they come from.
        hidden: channels between layers (D).
        inner: channels inside an expert (I).
        queries: query heads x head_dim (Q).
        keys: key-value heads x head_dim (K).
        heads: query heads.
        vocab: entries of the vocabulary.
        top_k: experts of a token (k).
        tied: whether embedding and head are one matrix.
        layers: the layers.
    """

    config: Mapping[str, Any]
    hidden: int
    inner: int
    queries: int
    keys: int
    heads: int
    vocab: int
    top_k: int
    tied: bool
    layers: tuple[LayerSize, ...]

    @property
    def table(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocab * self.hidden

    @property
    def ends(self) -> int:
        """Parameters outside the layers."""
        return self.table * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.ends + sum(layer.parameters for layer in self.layers)

    @property
    def largest_layer(self) -> int:
        """Parameters of the largest layer."""
        return max(layer.parameters for layer in self.layers)

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts."""
        return sum(layer.expert for layer in self.layers)


def model_size(config: Mapping[str, Any]) -> ModelSize:
    """Read the sizes from the plain dict of a `config.json`, of a parent or a child.

    Raises:
        ValueError: the model type belongs to no family, or a size is missing or not a positive whole number.
    """
    family, head_dim = family_of(config), whole(config, "head_dim")
    names, layers = family.layer, []
    one = {n: math.prod(s) for n, s in layer_shapes(config, num_experts=1, mxfp4=False).items()}
    router = sum(count for name, count in one.items() if name in names.router_tensors)
    expert = sum(count for name, count in one.items() if name in names.expert_tensors)
    for experts, window in layer_blocks(config):
        shared = sum(one.values()) - router - expert
        layers.append(LayerSize(experts, window, shared, experts * router, experts * expert))
    return ModelSize(
        config,
        whole(config, "hidden_size"),
        whole(config, family.config.expert_width),
        whole(config, "num_attention_heads") * head_dim,
        whole(config, "num_key_value_heads") * head_dim,
        whole(config, "num_attention_heads"),
        whole(config, "vocab_size"),
        whole(config, family.config.experts_per_token),
        bool(config.get("tie_word_embeddings", False)),
        tuple(layers),
    )


def stored_width(size: ModelSize) -> int:
    """Return the bytes of a stored number that is not in MXFP4."""
    return BYTES.get(str(size.config.get("torch_dtype") or size.config.get("dtype") or "bfloat16"), 2)


def stored_bytes(size: ModelSize) -> float:
    """Return the bytes of a checkpoint: MXFP4 experts with 4.25 bits a value where its configuration says so."""
    quantized = "quantization_config" in size.config
    width = stored_width(size)
    experts = size.expert_parameters
    return (size.parameters - experts) * width + experts * (4.25 / 8 if quantized else width)


def kv_bytes(size: ModelSize, rows: float, tokens: float, width: float) -> float:
    """Return the bytes of the KV cache of rows of as many tokens; a windowed layer keeps its window."""
    return rows * 2 * size.keys * width * sum(min(tokens, layer.window or tokens) for layer in size.layers)


def largest_kv_layer(size: ModelSize, rows: float, tokens: float, width: float) -> float:
    """Return the bytes of the KV cache of the layer that keeps most."""
    return rows * 2 * size.keys * width * max(min(tokens, layer.window or tokens) for layer in size.layers)


def held_bytes(size: ModelSize, held: Held, tokens: float, experts: int, chunk: float | None = None) -> float:
    """Return the bytes that one layer holds at a moment.

    Args:
        size: the model.
        held: the moment.
        tokens: that the layer runs on.
        experts: of the layer.
        chunk: tokens that router and experts take at a time; None: all.
    """
    shared = held.hidden * size.hidden + held.queries * size.queries + held.keys * size.keys + held.constant
    inside = size.top_k * (held.inner * size.inner + held.outputs * size.hidden) + held.experts * experts
    return tokens * shared + min(tokens, tokens if chunk is None else chunk) * inside


def fullest(size: ModelSize, moments: Sequence[Held], tokens: float, chunk: float | None = None) -> float:
    """Return the bytes of one layer at the fullest of some moments, for the layer where that is most."""
    counts = {layer.experts for layer in size.layers}
    return max(held_bytes(size, held, tokens, experts, chunk) for held in moments for experts in counts)


def forward_bytes(size: ModelSize, tokens: float, precision: str) -> float:
    """Return the bytes that one layer holds at most in a forward pass without gradients."""
    return fullest(size, ACTIVATIONS[precision].forward, tokens)


def attention_bytes(size: ModelSize, tokens: float, precision: str) -> float:
    """Return the bytes of a layer's attention in a forward pass without gradients: its last moment."""
    return fullest(size, ACTIVATIONS[precision].forward[-1:], tokens)


def saved_bytes(size: ModelSize, tokens: float, precision: str, chunk: float | None = None) -> float:
    """Return the bytes that all layers keep from forward to backward without checkpointing; chunks keep nothing."""
    held, in_chunks = ACTIVATIONS[precision].saved, chunk is not None and chunk < tokens
    inputs = len(size.layers) * stream_bytes(size, tokens, precision) if in_chunks else 0.0
    kept = 0.0 if in_chunks else None
    return inputs + sum(held_bytes(size, held, tokens, layer.experts, kept) for layer in size.layers)


def inside_bytes(size: ModelSize, tokens: float, precision: str, chunk: float | None = None) -> float:
    """Return the bytes of one layer at the fullest moment of forward with gradients, or of backward."""
    found = ACTIVATIONS[precision]
    return fullest(size, (*found.recorded, *found.backward), tokens, chunk)


def stream_bytes(size: ModelSize, tokens: float, precision: str) -> float:
    """Return the bytes of the states that one layer hands on to the next."""
    return tokens * size.hidden * ACTIVATIONS[precision].stream


def step_bytes(
    size: ModelSize, tokens: float, precision: str, checkpointed: bool, chunk: float | None
) -> dict[str, float]:
    """Return what the layers hold in a forward and backward pass, all of them together."""
    inside = inside_bytes(size, tokens, precision, chunk)
    if checkpointed:
        inputs = len(size.layers) * stream_bytes(size, tokens, precision)
        again = CHECKPOINT_STATES * stream_bytes(size, tokens, precision)
        return {"inputs of layers": inputs, "inside of one layer": inside + again}
    saved = saved_bytes(size, tokens, precision, chunk)
    return {"activations": saved, "inside of one layer": max(inside - saved / len(size.layers), 0.0)}
