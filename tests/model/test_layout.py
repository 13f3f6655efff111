"""Names and shapes a configuration implies, against transformers and the published parameter counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.released_twin import TWIN_CONFIG, twin_tensors
from transformers import GptOssConfig, GptOssForCausalLM

from lit_puzzle.model.layout import count_parameters, kv_values, layer_blocks, tensor_shapes

PARENT_120B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
}
WINDOWED = {3, 5, 21, 23, 27, 31, 33, 35}
HALVED = {15, 17, 19, *range(21, 36)}
CHILD_88B = PARENT_120B | {
    "model_type": "gpt_oss_puzzle",
    "block_configs": [
        {
            "num_local_experts": 64 if layer in HALVED else 128,
            "sliding_window": 128 if layer % 2 == 0 else 8192 if layer in WINDOWED else None,
        }
        for layer in range(36)
    ],
}


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"attention_bias": False}])
def test_shapes_are_those_of_the_stock_model(
    tiny_config: Callable[..., GptOssConfig], overrides: dict[str, bool]
) -> None:
    config = tiny_config(**overrides)
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    stock = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert tensor_shapes(config.to_dict()) == stock


def test_mxfp4_names_and_shapes_are_those_of_the_released_folder() -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in twin_tensors().items()}
    without_scales = {name: shape for name, shape in expected.items() if not name.endswith(("k_scale", "v_scale"))}
    assert tensor_shapes(TWIN_CONFIG, mxfp4_layers=range(6)) == without_scales


def test_published_parameter_counts_and_kv_saving() -> None:
    assert count_parameters(PARENT_120B) == 116_829_156_672
    assert count_parameters(CHILD_88B) == 88_150_438_080
    saving = 1 - kv_values(CHILD_88B, 131072) / kv_values(PARENT_120B, 131072)
    assert saving == pytest.approx(0.416, abs=5e-4)


def test_stock_layers_alternate_unless_layer_types_says_otherwise() -> None:
    assert layer_blocks(PARENT_120B)[:3] == [(128, 128), (128, None), (128, 128)]
    full = PARENT_120B | {"layer_types": ["full_attention"] * 36, "sliding_window": None}
    assert set(layer_blocks(full)) == {(128, None)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_local_experts": 0}, "num_local_experts"),
        ({"layer_types": ["full_attention"]}, "layer_types must list 36"),
        ({"layer_types": ["chunked_attention"] * 36}, "chunked_attention"),
        ({"sliding_window": -1}, "sliding_window"),
        ({"model_type": "gpt_oss_puzzle"}, "block_configs must list 36"),
        ({"model_type": "gpt_oss_puzzle", "block_configs": [7] * 36}, r"block_configs\[0\]"),
        (
            {"model_type": "gpt_oss_puzzle", "block_configs": [{"num_local_experts": 0, "sliding_window": None}] * 36},
            r"block_configs\[0\] of config.json: num_local_experts",
        ),
    ],
)
def test_impossible_configuration_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_blocks(PARENT_120B | change)


def test_mxfp4_rows_must_divide_into_blocks() -> None:
    with pytest.raises(ValueError, match=r"down_proj has rows of 2900"):
        tensor_shapes(PARENT_120B | {"intermediate_size": 2900}, mxfp4_layers={0})
