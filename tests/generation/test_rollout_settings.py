"""Settings of rollouts: what is refused, and the bound of an engine's dtype."""

import pytest

from lit_puzzle.generation.rollout_settings import ImportanceSampling, RolloutSettings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"engine": "sglang"}, r"rollouts\.engine is 'sglang'; allowed: \['transformers', 'vllm', 'server'\]"),
        ({"dtype": "float16"}, r"rollouts\.dtype is 'float16'"),
        ({"kv_cache_gib": 0.0}, r"rollouts\.kv_cache_gib is 0\.0"),
        ({"max_mismatch": float("nan")}, r"rollouts\.max_mismatch is nan"),
        ({"engine_seconds": float("inf")}, r"rollouts\.engine_seconds is inf"),
        ({"gpu_memory_share": 1.0}, r"gpu_memory_share is 1\.0"),
        ({"replay_routes": True}, r"need rollouts\.engine: vllm"),
        ({"tensor_parallel": 2}, r"need rollouts\.engine: vllm"),
        ({"engine": "server", "tensor_parallel": 2}, "a server shares its own GPUs and sends no routes"),
        ({"engine": "server", "replay_routes": True}, "a server shares its own GPUs and sends no routes"),
    ],
)
def test_refused(given, said):
    with pytest.raises(ValueError, match=said):
        RolloutSettings(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mode": "off"}, r"importance_sampling\.mode is 'off'"),
        ({"clip_min": 1.5}, r"clip_min=1\.5"),
        ({"clip_max": 0.5}, r"clip_max=0\.5"),
    ],
)
def test_refused_corrections(given, said):
    with pytest.raises(ValueError, match=said):
        ImportanceSampling(**given)


def test_the_bound_follows_the_dtype_unless_it_is_given():
    assert RolloutSettings().mismatch_bound("float32") < RolloutSettings().mismatch_bound("bfloat16")
    assert RolloutSettings(max_mismatch=0.5).mismatch_bound("float32") == 0.5
