"""kv_layout.py: vLLM's groups and blocks by hand, means by summing every step, and the patterns that engines padded."""

import itertools
import random
from typing import Any

import pytest

from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.engine import ServingEngine
from lit_puzzle.costs.kv_layout import (
    KVAllocation,
    group_width,
    groups_of,
    mean_blocks,
    most_blocks,
    padding_share,
    vllm_capacity,
    weighted_width,
    window_counts,
)
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.costs.serving import Block, Deployment
from lit_puzzle.spec import Scenario

CONFIG = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "num_experts_per_tok": 4,
}
LONG = Scenario("H100", 8, 65536, 65536, kv_dtype="fp8")


def pattern(full: int, wide: int, narrow: int = 18) -> tuple[tuple[int | None, int], ...]:
    return window_counts([None] * full + [8192] * wide + [128] * narrow)


def costs(**kv) -> CostModel:
    return CostModel(ModelShape.from_config(CONFIG), LONG, Roofline(), ServingEngine(kv=KVAllocation(**kv)))


def test_groups_have_the_least_or_within_half_more_the_most_layers() -> None:
    assert window_counts([128, None, 8192, None]) == ((None, 2), (8192, 1), (128, 1))
    assert group_width(pattern(10, 8)) == 8 and groups_of(pattern(10, 8)) == [(None, 2), (8192, 1), (128, 3)]
    assert group_width(pattern(0, 0)) == 18 and padding_share(pattern(0, 0)) == 0
    assert group_width(window_counts([None] * 16 + [128] * 20)) == 20  # 20 < 1.5 x 16
    assert group_width(window_counts([None] * 12 + [128] * 18)) == 12  # 18 is not below 1.5 x 12
    assert padding_share(pattern(10, 8)) == pytest.approx(1 - 36 / 48)


def test_measured_requests_over_those_of_the_parent() -> None:
    """What stock vLLM 0.32 was measured to hold at 128K context in the same memory."""

    def requests(counts) -> float:
        return vllm_capacity(counts, 40 * 2**30, 131072, 2048, 16, 8192).requests

    measured = {(10, 8): 1.03, (12, 6): 1.38, (9, 9): 1.70, (8, 10): 1.66}
    parent = requests(window_counts([None] * 18 + [128] * 18))
    for (full, wide), times in measured.items():
        assert requests(pattern(full, wide)) / parent == pytest.approx(times, abs=0.006)


def test_the_branch_for_the_released_model_pads_by_bytes() -> None:
    """A pool of 38.72 GiB (FP8, one GPU) was reported to hold 2,819,653 tokens, 21.51 requests of 131072."""
    width = weighted_width(pattern(10, 8), 131072, 16, 2 * 8192)
    assert width == 10 and groups_of(pattern(10, 8), width) == [(None, 1), (8192, 1), (128, 2)]
    held = vllm_capacity(pattern(10, 8), round(38.72 * 2**30), 131072, 2 * 8 * 64, 16, 2 * 8192, width)
    assert held.requests == pytest.approx(21.51, abs=0.005)
    assert held.requests * 131072 == pytest.approx(2_819_653, rel=2e-4)
    parent = window_counts([None] * 18 + [128] * 18)
    assert weighted_width(parent, 131072, 16, 16384) == 18  # no padding, and the widest
    # Where all layers reserve the same, 2 pads nothing; 3 is wider and pads 3 of 36 layers, less than a tenth.
    assert weighted_width(pattern(10, 8), 8192, 16, 8192) == 3
    assert weighted_width(((None, 4), (128, 2)), 100, 16, 8192) == 2  # 3 and 4 pad 3 and 2 of 6 layers
    assert weighted_width(((None, 3), (128, 1)), 100, 16, 8192) == 3  # at most 3 layers: one group each


def test_mean_blocks_is_the_mean_over_every_step() -> None:
    generator = random.Random(0)
    for prompt, generated, window, block in itertools.product((0, 5, 100), (1, 37), (None, 1, 16, 50), (1, 16)):
        prompt += generator.randrange(7)
        held = []
        for cached in range(prompt + 1, prompt + generated + 1):
            tokens = range(cached)
            kept = tokens if window is None else tokens[max(0, cached - window) :]
            held.append(len({token // block for token in kept}))
        assert mean_blocks(prompt, generated, window, block) == pytest.approx(sum(held) / generated)


def test_blocks_that_vllm_reserves() -> None:
    assert most_blocks(131072, None, 16, 8192) == 8192
    assert most_blocks(131072, 128, 16, 8192) == -(-(127 + 8192) // 16) + 1
    assert most_blocks(100, 8192, 16, 8192) == 8  # never more than the context, and one for a window's odd start
    with pytest.raises(ValueError, match="1000 bytes hold no block of 589824 bytes"):
        vllm_capacity(pattern(0, 0), 1000, 100, 2048, 16, 8192)


def test_a_cost_model_counts_as_its_engine_allocates() -> None:
    ideal, real = costs(allocator="ideal"), costs()
    (one,) = (deployment for deployment in real.deployments() if deployment.tensor_parallel == 8)
    token = 2 * 1 * 64  # one key-value head on each of 8 GPUs, FP8
    block = 8 * 16 * token
    held = 2 * mean_blocks(65536, 65536, None, 16) + mean_blocks(65536, 65536, 8192, 16)
    held += 3 * mean_blocks(65536, 65536, 128, 16)
    fixed = 1 + (1 + 3) * 2 * 8192 // 16  # the windows' groups hold two batches of prompt tokens
    demand = real.kv_demand(pattern(10, 8), one)
    assert demand.request_bytes == pytest.approx(block * held) and demand.fixed_bytes == block * fixed
    blocks = [Block(128, window) for window, count in pattern(10, 8) for _ in range(count)]
    assert ideal.kv_demand(pattern(10, 8), one).request_bytes == pytest.approx(
        sum(ideal.block(each, one, 1).kv_bytes for each in blocks)
    )
    assert real.largest_batch(blocks, one) < ideal.largest_batch(blocks, one)
    branch = costs(allocator="vllm_weighted")
    assert real.largest_batch(blocks, one) < branch.largest_batch(blocks, one) < ideal.largest_batch(blocks, one)
    short = costs(
        allocator="vllm_weighted", context_tokens=8192
    )  # groups of 3: two layers of padding of full attention
    assert short.largest_batch(blocks, one) < branch.largest_batch(blocks, one)
    batch = real.largest_batch(blocks, one)
    assert real.predict(blocks, one, batch).fits and not real.predict(blocks, one, batch + 1).fits
    assert real.kv_demand(window_counts([None] * 36), Deployment(1, 1, 8)).fixed_bytes == 36 * 16 * 2 * 8 * 64


def test_requests_in_step_are_counted_at_their_longest() -> None:
    for allocator in ("ideal", "vllm"):
        model = costs(allocator=allocator, requests="in_step")
        (one,) = (deployment for deployment in model.deployments() if deployment.tensor_parallel == 8)
        token = 2 * 1 * 64
        demand = model.kv_demand(window_counts([None] * 18 + [128] * 18), one)
        assert demand.request_bytes == 18 * token * (131072 + 128)  # 128 tokens are 8 whole blocks at the end
        assert (
            demand.request_bytes
            > costs(allocator=allocator).kv_demand(window_counts([None] * 18 + [128] * 18), one).request_bytes
        )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"version": "0.13.0"}, "the KV cache of vLLM '0.13.0' is not modeled; allowed: "),
        ({"allocator": "paged"}, "unknown allocator 'paged'; allowed"),
        ({"block_tokens": 24}, "block_tokens must be a multiple of 16, got 24"),
        ({"context_tokens": 0}, "context_tokens must be a whole number of at least 1, got 0"),
        ({"context_tokens": float("nan")}, "context_tokens must be a whole number of at least 1, got nan"),
        ({"concurrent_batches": 3}, "concurrent_batches must be 1 or 2, got 3"),
    ],
)
def test_what_is_not_modeled_or_refused_by_vllm_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVAllocation(**setting)
    with pytest.raises(ValueError, match="requests must be one of"):
        KVAllocation(requests="all")  # type: ignore[arg-type]
    assert KVAllocation(version="0.33.1").version == "0.33.1"
