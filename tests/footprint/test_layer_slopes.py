"""The bytes of a layer of gpt-oss's shape are those that were measured on a CPU, in bytes per token."""

import pytest

from lit_puzzle.model.footprint import (
    ModelSize,
    inside_bytes,
    kv_bytes,
    model_size,
    saved_bytes,
    step_bytes,
    stream_bytes,
)
from lit_puzzle.model.planned_shape import PUBLISHED

TOKENS, MIXED = 131072, "bf16-mixed"


@pytest.fixture(scope="module")
def one_layer() -> ModelSize:
    sizes = {"num_hidden_layers": 1, "num_local_experts": 8, "layer_types": ["full_attention"]}
    return model_size({**PUBLISHED["20b"], **sizes})


def test_slopes_measured_by_layer_memory(one_layer: ModelSize) -> None:
    assert saved_bytes(one_layer, TOKENS, MIXED) / TOKENS == pytest.approx(251_800, rel=0.01)
    assert inside_bytes(one_layer, TOKENS, MIXED) / TOKENS == pytest.approx(349_000, rel=0.01)
    checkpointed = step_bytes(one_layer, TOKENS, MIXED, True, None)
    assert checkpointed["inside of one layer"] / TOKENS == pytest.approx(384_312, rel=0.01)
    assert checkpointed["inputs of layers"] == stream_bytes(one_layer, TOKENS, MIXED) == TOKENS * 5760


def test_chunks_of_tokens_keep_attention_and_the_input_of_the_experts(one_layer: ModelSize) -> None:
    chunked = saved_bytes(one_layer, TOKENS, MIXED, 16384) / TOKENS
    assert chunked == pytest.approx(96_000, rel=0.01)
    assert saved_bytes(one_layer, TOKENS, MIXED, TOKENS) / TOKENS == pytest.approx(251_800, rel=0.01)
    whole, parts = (inside_bytes(one_layer, TOKENS, MIXED, chunk) for chunk in (None, 16384))
    assert parts < 0.5 * whole


def test_cache_of_a_token_is_that_of_the_card(one_layer: ModelSize) -> None:
    assert kv_bytes(one_layer, 1, 1, 2) == 2048
