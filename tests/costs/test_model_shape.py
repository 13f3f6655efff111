"""model_shape.py: parameters of a layer by hand, and against all tensors of a checkpoint."""

import math
from typing import Any

import pytest

from lit_puzzle.costs.model_shape import LayerTensors, ModelShape, layer_tensors
from lit_puzzle.model.layout import layer_shapes

CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "vocab_size": 10,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_by_hand(bias: bool) -> None:
    assert layer_tensors(CONFIG | {"attention_bias": bias}) == LayerTensors(
        query_heads=2 * 8 * 12 + 4 + 12 * bias,  # queries, output, sinks
        kv_heads=2 * (8 * 6 + 6 * bias),
        replicated=2 * 8 + 8 * bias,
        router=8 + 1,
        expert_matrices=3 * 8 * 6,
        expert_split_biases=2 * 6,
        expert_bias=8,
    )


def test_an_output_bias_as_long_as_the_heads_is_not_taken_for_sinks() -> None:
    assert layer_tensors(CONFIG | {"hidden_size": 4}).replicated == 3 * 4


@pytest.mark.parametrize("experts", [1, 7])
def test_every_tensor_of_a_layer_is_counted_once(experts: int) -> None:
    layer = layer_tensors(CONFIG)
    per_expert = layer.router + layer.expert_matrices + layer.expert_split_biases + layer.expert_bias
    counted = layer.query_heads + layer.kv_heads + layer.replicated + experts * per_expert
    assert counted == sum(math.prod(shape) for shape in layer_shapes(CONFIG, experts, mxfp4=False).values())


def test_json_and_back() -> None:
    shape = ModelShape.from_config(CONFIG | {"tie_word_embeddings": True})
    assert ModelShape.from_json(shape.to_json()) == shape
    assert shape.tied_embeddings and (shape.hidden, shape.intermediate, shape.experts_per_token) == (8, 6, 2)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type 'other' is not supported"):
        ModelShape.from_config(CONFIG | {"model_type": "other"})
