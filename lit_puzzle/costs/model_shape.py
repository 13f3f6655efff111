"""The sizes of a model that its costs depend on, read from its `config.json` through its family.

Reads and writes nothing. The parameters of a layer with E experts are

    query_heads + kv_heads + replicated + E (router + expert_matrices + expert_split_biases + expert_bias)

with numbers that `layer_tensors` counts from the names and shapes of the family's tensors.

Source: tensor parallelism of Megatron-LM (arXiv 1909.08053) for how ranks split a layer; expert parallelism gives each
group of ranks whole experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from lit_puzzle.model.family import LayerNames, family_of
from lit_puzzle.model.layout import Shape, layer_shapes, whole
from lit_puzzle.run.strict_json import checked_fields


@dataclass(frozen=True)
class LayerTensors:
    """Numbers of parameters of a layer, by how the GPUs of one replica hold them.

    Attributes:
        query_heads: projections of queries and output, biases of queries, and all else that has one number per query
            head; split over the ranks.
        kv_heads: projections of keys and values with their biases; split over at most one rank per key-value head.
        replicated: norms, bias of the output projection; whole on every rank.
        router: router, for each expert; whole on every rank.
        expert_matrices: matrices of one expert; split over the ranks.
        expert_split_biases: biases of all matrices of one expert but the last; split over the ranks.
        expert_bias: bias of the last matrix of one expert; whole on every rank of the group that holds the expert.
    """

    query_heads: int
    kv_heads: int
    replicated: int
    router: int
    expert_matrices: int
    expert_split_biases: int
    expert_bias: int


@dataclass(frozen=True)
class ModelShape:
    """The sizes that all layers of parent and child share.

    Attributes:
        hidden: channels between layers.
        intermediate: channels inside an expert.
        num_query_heads: query heads.
        num_kv_heads: key-value heads.
        head_dim: channels of a head.
        vocab: entries of the vocabulary.
        experts_per_token: experts that a token is routed to.
        tied_embeddings: whether embedding and head are one matrix.
        layer: parameters of a layer.
    """

    hidden: int
    intermediate: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    experts_per_token: int
    tied_embeddings: bool
    layer: LayerTensors

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the shape from the plain dict of a `config.json`.

        Raises:
            ValueError: the model type belongs to no family, or a size is missing or not a positive whole number.
        """
        keys = family_of(config).config
        return cls(
            hidden=whole(config, "hidden_size"),
            intermediate=whole(config, keys.expert_width),
            num_query_heads=whole(config, "num_attention_heads"),
            num_kv_heads=whole(config, "num_key_value_heads"),
            head_dim=whole(config, "head_dim"),
            vocab=whole(config, "vocab_size"),
            experts_per_token=whole(config, keys.experts_per_token),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            layer=layer_tensors(config),
        )

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Invert `to_json`.

        Raises:
            ValueError: a key is unknown or missing.
        """
        values = checked_fields(cls, data)
        return cls(**values | {"layer": LayerTensors(**checked_fields(LayerTensors, values["layer"]))})


def layer_tensors(config: Mapping[str, Any]) -> LayerTensors:
    """Count the parameters of a layer with one expert, from the shapes of its tensors.

    Raises:
        ValueError: the model type belongs to no family, or a size is missing or not a positive whole number.
    """
    names, heads = family_of(config).layer, whole(config, "num_attention_heads")
    counts = {field.name: 0 for field in dataclasses.fields(LayerTensors)}
    for name, shape in layer_shapes(config, num_experts=1, mxfp4=False).items():
        counts[_holder(name, shape, names, heads)] += math.prod(shape)
    return LayerTensors(**counts)


def _holder(name: str, shape: Shape, names: LayerNames, heads: int) -> str:
    """Return the field of `LayerTensors` that a tensor counts for."""
    queries, keys, values, output = (f"{names.attention}.{projection}." for projection in names.projections)
    *split, last = (f"{names.experts}.{matrix}" for matrix in names.expert_matrices)
    if name.startswith(queries) or name == f"{output}weight":
        return "query_heads"
    if name.startswith((keys, values)):
        return "kv_heads"
    if name in names.router_tensors:
        return "router"
    if name in (*split, last):
        return "expert_matrices"
    if name in {f"{matrix}_bias" for matrix in split}:
        return "expert_split_biases"
    if name == f"{last}_bias":
        return "expert_bias"
    if name.startswith(f"{names.attention}.") and not name.startswith(output) and shape == (heads,):
        return "query_heads"  # one number per query head, such as attention sinks
    return "replicated"
