"""roofline.py: bytes over bandwidth and operations over FLOP/s, added up by hand."""

from dataclasses import replace
from typing import Any

import pytest

from lit_puzzle.costs.engine import EngineStep, ServingEngine
from lit_puzzle.costs.gpus import find_gpu, gpus
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline, attended_pairs
from lit_puzzle.costs.serving import Block, Deployment, Setting
from lit_puzzle.spec import Scenario

TINY_CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "vocab_size": 10,
    "num_experts_per_tok": 2,
}
TINY = ModelShape.from_config(TINY_CONFIG)
PEAK = Roofline(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0, 0.0)
ENGINE = ServingEngine(chunk_tokens=4, step=EngineStep(overhead_seconds=0.5, sampling_bytes=0.0))


def setting(ranks: int = 1, gpu: str = "H100", **changes: Any) -> Setting:
    scenario = Scenario(gpu, ranks, 10, 10, expert_dtype="bfloat16")
    return Setting(TINY, replace(scenario, **changes), Deployment(ranks, 1, 1), ENGINE)


def test_one_token_moves_weights_and_cache_once() -> None:
    """One sequence is bound by memory everywhere: bytes over bandwidth, added up by hand."""
    attention = 8 * 8 + 2 * (4 * 8) + 8 * 8
    router, experts = 3 * 8, 2 * (3 * 8 * 6)  # one token touches 2 of 3 experts
    cache = 2 * 2 * 2 * 1 * 5  # keys and values, 2 heads of 2, fp8, 5 tokens in the window of 5
    moved = 2 * (attention + router + experts) + cache
    seconds = PEAK.decode_layer(setting(), Block(3, 5), 1, 9.0)
    assert seconds == pytest.approx(moved / 3.35e12, rel=1e-12)


def test_a_long_prompt_is_arithmetic() -> None:
    """On a device whose arithmetic is the bound, the time is operations over flops: 10 tokens in chunks of 4, 4, 2."""
    shape = ModelShape.from_config(TINY_CONFIG | {"hidden_size": 800, "intermediate_size": 600})
    wide = Setting(shape, Scenario("cpu", 1, 10**6, 1), Deployment(1, 1, 1), ServingEngine(chunk_tokens=250_000))
    dense = 800 * (8 + 2 * 4 + 8) + 3 * 800
    experts = 2 * (3 * 800 * 600)
    operations = 10**6 * 2 * (dense + experts) + 4 * 8 * (10**6 * (10**6 + 1) / 2)
    assert PEAK.prefill_layer(wide, Block(3, None), 10**6) == pytest.approx(operations / 1.95e11, rel=1e-9)


def test_attended_pairs_by_counting() -> None:
    for tokens in range(12):
        for window in (None, 1, 3, 20):
            counted = sum(query - key < (window or 99) for query in range(tokens) for key in range(query + 1))
            assert attended_pairs(tokens, window) == counted


def test_ranks_split_the_work_and_communicate() -> None:
    """2 ranks halve what is split; two all-reduces of one token's hidden values come on top."""
    one, two = (PEAK.decode_layer(setting(ranks), Block(3, None), 1, 5.0) for ranks in (1, 2))
    gpu = find_gpu("H100")
    all_reduces = 2 * (gpu.link_seconds + 2 * 1 / 2 * 2 * 8 / gpu.link_bytes_per_second)
    router = 2 * 3 * 8 / 3.35e12  # replicated on both
    assert two == pytest.approx((one - router) / 2 + router + all_reduces, rel=1e-12)


def test_overhead_and_head_by_hand() -> None:
    seconds = PEAK.decode_rest(setting(), 1)
    assert seconds == pytest.approx(0.5 + 2 * 10 * 8 / 3.35e12, rel=1e-12)
    assert PEAK.prefill_rest(setting(), 10) == pytest.approx(2 * 10 * 8 / 3.35e12, rel=1e-12)


def test_launches_add_up() -> None:
    slow = replace(PEAK, kernels_per_layer=7, launch_seconds=0.25)
    block = Block(3, None)
    assert slow.decode_layer(setting(), block, 1, 5.0) - PEAK.decode_layer(setting(), block, 1, 5.0) == pytest.approx(
        1.75
    )


@pytest.mark.parametrize("share", ["attention_bandwidth", "expert_bandwidth", "dense_bandwidth"])
def test_each_share_slows_its_own_kernel(share: str) -> None:
    """Half the share doubles one kernel and leaves the others."""
    kernels = {
        "attention_bandwidth": 2 * 2 * 2 * 1 * 5,
        "expert_bandwidth": 2 * 2 * (3 * 8 * 6),
        "dense_bandwidth": 2 * (8 * 8 + 2 * (4 * 8) + 8 * 8 + 3 * 8),
    }
    changes: dict[str, Any] = {share: 0.5}
    half = replace(PEAK, **changes)
    block = Block(3, None)
    more = half.decode_layer(setting(), block, 1, 5.0) - PEAK.decode_layer(setting(), block, 1, 5.0)
    assert more == pytest.approx(kernels[share] / 3.35e12, rel=1e-9)


def test_every_device_names_its_source() -> None:
    assert {"H100", "H200", "B200", "A100", "cpu"} <= set(gpus())
    for gpu in gpus().values():
        assert gpu.vllm.max_sequences >= 1
        assert len(gpu.source) > 20 and gpu.memory_gib > 1 and gpu.memory_bytes_per_second < gpu.bfloat16_flops


def test_arithmetic_that_a_device_lacks() -> None:
    Roofline().check(setting(gpu="A100"))
    with pytest.raises(ValueError, match="no fp8 arithmetic for A100"):
        Roofline().check(setting(gpu="A100", expert_dtype="fp8"))
    with pytest.raises(ValueError, match="unknown GPU 'V100'; allowed"):
        Roofline().check(setting(gpu="V100"))


def test_shares_are_shares() -> None:
    with pytest.raises(ValueError, match=r"expert_arithmetic is a share .* got 1\.5"):
        Roofline(expert_arithmetic=1.5)
    with pytest.raises(ValueError, match="launch_seconds must not be negative"):
        Roofline(launch_seconds=-1.0)
