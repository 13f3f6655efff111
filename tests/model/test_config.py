"""A configuration means here what it means to transformers; what programs read differently is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig

from lit_puzzle.model.config import check_config, essentials, read_config, rope_parameters
from lit_puzzle.model.family import GPT_OSS

YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0}
CONFIG: dict[str, Any] = {
    **{"model_type": "gpt_oss", "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "sliding_window": 8},
    **{"num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 131072},
    "rope_parameters": {**YARN, "rope_theta": 150000.0},
}
CHILD = CONFIG | {
    "model_type": "gpt_oss_puzzle",
    "block_configs": [{"num_local_experts": 4, "sliding_window": 8}, {"num_local_experts": 1, "sliding_window": None}],
}


def without(*keys: str, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in CONFIG.items() if key not in keys} | more


SAME = [  # ways to write the rotary parameters of CONFIG
    {},
    {"rope_parameters": YARN, "rope_theta": 150000},
    {"rope_parameters": YARN},
    {"rope_parameters": None, "rope_scaling": YARN, "rope_theta": 150000.0},
    {"rope_parameters": None, "rope_scaling": {"type": "yarn"} | {k: YARN[k] for k in YARN if k != "rope_type"}},
    {"rope_scaling": YARN, "rope_theta": 150000},
    {"rope_parameters": YARN | {"factor": 32, "rope_theta": 150000}},
]


@pytest.mark.parametrize("change", SAME)
def test_rotary_parameters_are_those_that_transformers_computes_with(change: dict[str, Any]) -> None:
    config = CONFIG | change
    read = {key: value for key, value in GptOssConfig(**config).rope_parameters.items() if key != "type"}
    assert rope_parameters(config) == read
    assert essentials(config) == essentials(CONFIG)
    check_config(config)


def test_rotary_parameters_without_scaling() -> None:
    for rope in ({"rope_type": "default", "rope_theta": 10000.0}, {"rope_theta": 10000.0}):
        config = CONFIG | {"rope_parameters": dict(rope)}
        assert rope_parameters(config) == {"rope_type": "default", "rope_theta": 10000.0}
        assert GptOssConfig(**config).rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_defaults_are_those_of_transformers() -> None:
    stock, keys = GptOssConfig(), GPT_OSS.config
    assert {key: stock.to_dict()[key] for key in keys.constants} == dict(keys.constants)
    assert (GptOssConfig.default_theta, stock.hidden_act) == (keys.rope_theta, keys.activation)
    assert (stock.attention_bias, stock.tie_word_embeddings) == (keys.attention_bias, False)
    stated = CONFIG | dict(keys.constants) | {"attention_bias": True, "tie_word_embeddings": False}
    assert essentials(stated) == essentials(CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-6},
        {"swiglu_alpha": 1.5},
        {"attention_bias": False},
        {"tie_word_embeddings": True},
        {"num_experts_per_tok": 3},
        {"num_local_experts": 4},
        {"sliding_window": 4},
        {"rope_parameters": YARN | {"factor": 16.0}},
        {"rope_parameters": YARN | {"truncate": False}},
    ],
)
def test_what_changes_the_model_changes_its_essentials(change: dict[str, Any]) -> None:
    check_config(CONFIG | change)
    assert essentials(CONFIG | change) != essentials(CONFIG)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (without("rope_parameters"), "rope_parameters is missing"),
        (CONFIG | {"rope_scaling": YARN | {"factor": 16.0}}, "rope_scaling means .*16.0.* but rope_parameters means"),
        (CONFIG | {"rope_theta": 10000}, "rope_theta is 10000, but rope_parameters has 150000.0"),
        (CONFIG | {"rope_parameters": YARN | {"factor": None}}, "factor of rope_parameters must be a finite number"),
        (CONFIG | {"rope_parameters": YARN | {"factor": "32"}}, "factor of rope_parameters must be a finite number"),
        (CONFIG | {"rope_parameters": YARN | {"original_max_position_embeddings": 0}}, "original_max_position"),
        (
            CONFIG | {"original_max_position_embeddings": 8192},
            "original_max_position_embeddings is 8192",
        ),
        (CONFIG | {"rope_parameters": {"rope_type": "spiral"}}, "rope_type of rope_parameters must be one of"),
        (CONFIG | {"rope_parameters": YARN | {"type": "linear"}}, "rope_type of rope_parameters must be one of"),
        (
            CONFIG | {"rope_parameters": YARN | {"beta_fast": "32"}},
            "beta_fast of rope_parameters must be a finite number",
        ),
        (
            CONFIG | {"rope_parameters": YARN | {"attention_factor": -1.0}},
            "attention_factor of rope_parameters must be",
        ),
        (CONFIG | {"rope_parameters": YARN | {"factor": 1e300}}, "factor of rope_parameters must be a finite number"),
        (CONFIG | {"rope_parameters": YARN | {"truncate": "no"}}, "truncate of rope_parameters must be true or false"),
        (
            CONFIG | {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor of rope_parameters",
        ),
        (CONFIG | {"rope_parameters": YARN | {"rope_type": "llama3"}}, "low_freq_factor of rope_parameters must be"),
        (CONFIG | {"rope_parameters": YARN | {"rope_type": ["yarn"]}}, "rope_type of rope_parameters must be one of"),
        (CONFIG | {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        (CONFIG | {"return_dict": False}, "return_dict must be true, got False"),
        (CONFIG | {"output_router_logits": True}, "output_router_logits must be false, got True"),
        (CONFIG | {"attention_dropout": 0.1}, "attention_dropout must be 0, got 0.1"),
        (CONFIG | {"num_labels": 10**9}, "num_labels is 1000000000; at most 65536 are read"),
        (CONFIG | {"pad_token_id": 10**6}, "pad_token_id must be a token of the vocabulary of"),
        (CONFIG | {"swiglu_limit": 1e308}, "swiglu_limit must be a finite number above 0"),
        (CONFIG | {"rope_parameters": [1]}, "rope_parameters must be one object of values"),
        (CONFIG | {"rope_parameters": {"full_attention": YARN}}, "rope_parameters must be one object of values"),
        (CONFIG | {"experts_per_token": 4}, "experts_per_token is 4, but num_experts_per_tok is 2"),
        (without("num_experts_per_tok", experts_per_token=2), "num_experts_per_tok must be a positive whole number"),
        (CONFIG | {"num_experts": 4}, "num_experts is 4, but num_local_experts is 8"),
        (CONFIG | {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but the layers have 8 experts"),
        (
            CONFIG | {"num_key_value_heads": 3},
            "num_attention_heads is 4, which num_key_value_heads, 3, does not divide",
        ),
        (CONFIG | {"head_dim": 7}, "head_dim must be even"),
        (CONFIG | {"hidden_size": True}, "hidden_size must be a positive whole number below 2.31, got True"),
        (CONFIG | {"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        (CONFIG | {"rms_norm_eps": 0}, "rms_norm_eps must be a finite number above 0"),
        (CONFIG | {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        (CONFIG | {"dtype": "int8"}, "dtype must be one of"),
        (CONFIG | {"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype is float32, but torch_dtype is bfloat16"),
        (
            CONFIG | {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config must have the quant_method",
        ),
        (CONFIG | {"quantization_config": "mxfp4"}, "quantization_config must have the quant_method"),
        (CHILD | {"layer_types": ["full_attention"] * 2}, "layer_types is .* but block_configs means"),
    ],
)
def test_contradiction_is_refused_with_its_keys(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        check_config(config)


def test_child_whose_layer_has_fewer_experts_than_a_token_takes_is_allowed() -> None:
    check_config(CHILD)
    check_config(CHILD | {"layer_types": ["sliding_attention", "full_attention"]})
    check_config(CONFIG | {"experts_per_token": 2, "num_experts": 8, "quantization_config": {"quant_method": "mxfp4"}})


def test_message_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert read_config(tmp_path) == CONFIG
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"head_dim": 7}))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config\.json: head_dim must be even"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="nothing is not a folder"):
        read_config(tmp_path / "nothing")
