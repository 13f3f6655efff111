"""cost_model.py: totals by hand, counts against the checkpoint's tensors, the best deployment by trying all."""

import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from lit_puzzle.costs.accounting import distinct_experts, mean_context, mean_over_steps
from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.engine import EngineMemory, EngineStep, ServingEngine
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.costs.serving import Block, Deployment, Setting, parent_blocks
from lit_puzzle.model.layout import count_parameters, tensor_shapes
from lit_puzzle.spec import Scenario

PARENT_120B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(36)],
}
CHILD_88B = PARENT_120B | {
    "model_type": "gpt_oss_puzzle",
    "block_configs": [
        {
            "num_local_experts": 64 if layer in {15, 17, 19, *range(21, 36)} else 128,
            "sliding_window": (8192 if layer in {3, 5, 21, 23, 27, 31, 33, 35} else None) if layer % 2 else 128,
        }
        for layer in range(36)
    ],
}
SHAPE = ModelShape.from_config(PARENT_120B)
SCENARIO = Scenario("H100", 8, 1000, 500)
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


@dataclass(frozen=True)
class Clock:
    """Seconds that are easy to add up by hand."""

    name: ClassVar[str] = "clock"

    def check(self, setting: Setting) -> None:
        pass

    def decode_layer(self, setting: Setting, block: Block, batch_size: int, context_tokens: float) -> float:
        return block.num_experts + batch_size * min(context_tokens, block.window_tokens or math.inf)

    def prefill_layer(self, setting: Setting, block: Block, prompt_tokens: int) -> float:
        return 2.0 * prompt_tokens

    def decode_rest(self, setting: Setting, batch_size: int) -> float:
        return 3.0 * batch_size

    def prefill_rest(self, setting: Setting, prompt_tokens: int) -> float:
        return 5.0


@pytest.mark.parametrize(("config", "parameters"), [(PARENT_120B, 116_829_156_672), (CHILD_88B, 88_150_438_080)])
def test_parameters_are_those_of_the_checkpoint(config: dict[str, Any], parameters: int) -> None:
    costs = CostModel(ModelShape.from_config(config), SCENARIO, Clock())
    prediction = costs.predict(parent_blocks(config), costs.deployments()[0], 1)
    assert prediction.parameters == parameters == count_parameters(config)
    # What the gpt-oss model card counts: the head and 4 experts a layer, not the embedding. Only the router shrinks.
    assert round(prediction.active_parameters / 1e9, 2) == 5.13


@pytest.mark.parametrize("config", [PARENT_120B, CHILD_88B])
def test_weight_bytes_are_those_of_the_stored_tensors(config: dict[str, Any]) -> None:
    """MXFP4 tensors are bytes, all others bfloat16: counted from the checkpoint's names and shapes."""
    stored = sum(
        math.prod(shape) * (1 if name.endswith(("_blocks", "_scales")) else 2)
        for name, shape in tensor_shapes(config, mxfp4_layers=range(36)).items()
    )
    costs = CostModel(ModelShape.from_config(config), replace(SCENARIO, num_gpus=1), Clock())
    (deployment,) = costs.deployments()
    counted = costs.rest(deployment, 1).weight_bytes
    counted += sum(costs.block(block, deployment, 1).weight_bytes for block in parent_blocks(config))
    assert counted == stored
    if config is PARENT_120B:
        assert stored == 65_248_815_744  # the released checkpoint: 65.25 GB


def test_shared_weights_by_hand() -> None:
    """TINY over 4 ranks in 2 expert groups, bfloat16 everywhere; 2 key-value heads become 1 on each of 4 ranks."""
    scenario = Scenario("H100", 4, 5, 5, tensor_parallel=4, expert_parallel=2, expert_dtype="bfloat16")
    costs = CostModel(TINY, scenario, Clock())
    norms, router = 2 * 8, 6 * 8 + 6
    attention = 8 * 2 + 2 * (8 * 2) + 2 * 8 + 1  # one query head, one key head, one value head, output, one sink
    biases = 2 + 2 + 2 + 8
    experts = 3 * (3 * 8 * 6 / 2 + 2 * 6 / 2 + 8)  # 3 experts of 6 on this group, halved; the second bias is whole
    block = costs.block(Block(6, None), Deployment(4, 2, 1), 1)
    assert block.weight_bytes == 2 * (norms + router + attention + biases + experts)
    assert block.kv_bytes == 2 * 1 * 2 * 1 * (6 + 7 + 8 + 9 + 10) / 5
    assert costs.rest(Deployment(4, 2, 1), 1).weight_bytes == 2 * (2 * 10 * 8 / 4 + 8)


def test_number_formats_of_weights() -> None:
    wide = Scenario("H100", 1, 5, 5, weight_dtype="float32", expert_dtype="mxfp4")
    costs = CostModel(SHAPE, wide, Clock())
    deployment = costs.deployments()[0]
    plain = count_parameters(PARENT_120B | {"num_hidden_layers": 1, "layer_types": ["full_attention"]})
    plain -= 2 * 201088 * 2880 + 2880 + 128 * 3 * 2880 * 2880
    assert costs.block(Block(128, None), deployment, 1).weight_bytes == 4 * plain + 128 * 3 * 2880 * 2880 * 4.25 / 8


def test_mean_context_is_the_sum_over_the_steps() -> None:
    generator = random.Random(3)
    for _ in range(200):
        scenario = Scenario("H100", 1, generator.randrange(40), generator.randrange(1, 40))
        window = generator.choice([None, generator.randrange(1, 90)])
        steps = range(scenario.prompt_tokens + 1, scenario.total_tokens + 1)
        brute = sum(min(step, window or step) for step in steps) / len(steps)
        assert mean_context(scenario, window) == pytest.approx(brute, rel=1e-12)
        most = window or math.inf
        attended = mean_over_steps(scenario, window, lambda context: 7 + 3 * min(context, most))  # noqa: B023
        assert attended == pytest.approx(7 + 3 * brute, rel=1e-12)


def test_distinct_experts_by_drawing() -> None:
    generator = random.Random(0)
    for experts, per_token, tokens in ((16, 2, 5), (128, 4, 40), (8, 4, 1), (4, 4, 3)):
        draws = [
            len(set().union(*(generator.sample(range(experts), per_token) for _ in range(tokens)))) for _ in range(3000)
        ]
        assert distinct_experts(experts, per_token, tokens) == pytest.approx(sum(draws) / len(draws), rel=0.02)


def test_totals_by_hand() -> None:
    """Two layers, batch 3, contexts 11..14: throughput and latency from the sums alone."""
    costs = CostModel(TINY, Scenario("H100", 2, 10, 4, tensor_parallel=1), Clock())
    (deployment,) = costs.deployments()
    prediction = costs.predict([Block(6, None), Block(4, 12)], deployment, 3)
    full, window = 6 + 3 * 12.5, 4 + 3 * (11 + 12 + 12 + 12) / 4
    request = 3 * (2 * 20 + 5) + 4 * (full + window + 9)
    assert prediction.step_seconds == pytest.approx(full + window + 9)
    assert prediction.latency_seconds == pytest.approx(request)
    assert prediction.tokens_per_second == pytest.approx(2 * 3 * 4 / request)
    assert prediction.to_json()["deployment"] == {"tensor_parallel": 1, "expert_parallel": 1, "replicas": 2}


def test_usable_memory_by_hand() -> None:
    """80 GiB x 0.92 x 0.98, less 3.5 GiB, less collectives, less 2 x 22 (10) x 8192 x 4096 bytes of activations."""
    costs = CostModel(SHAPE, SCENARIO, Clock())
    single, eight = (costs.usable_bytes(Deployment(ranks, 1, 8 // ranks)) / 2**30 for ranks in (1, 8))
    assert single == pytest.approx(80 * 0.9016 - 3.5 - 1.375, abs=1e-9)
    assert eight == pytest.approx(80 * 0.9016 - 3.5 - 392 / 1024 - 0.625, abs=1e-3)


def test_best_is_the_best_of_all() -> None:
    costs = CostModel(SHAPE, SCENARIO, Roofline(), ServingEngine(max_sequences=40))
    blocks = parent_blocks(CHILD_88B)
    everything = [
        costs.predict(blocks, deployment, size)
        for deployment, size in itertools.product(costs.deployments(), range(1, 41))
    ]
    fastest = max((each for each in everything if each.fits), key=lambda each: each.tokens_per_second)
    assert costs.best(blocks) == fastest
    assert [deployment.tensor_parallel for deployment in costs.deployments()] == [1, 2, 4, 8]


def test_the_largest_batch_is_where_memory_ends() -> None:
    costs = CostModel(SHAPE, Scenario("H100", 1, 60000, 60000), Clock())
    (deployment,) = costs.deployments()
    blocks = parent_blocks(CHILD_88B)
    largest = costs.largest_batch(blocks, deployment)
    assert 1 < largest < 1024
    assert costs.predict(blocks, deployment, largest).fits
    assert not costs.predict(blocks, deployment, largest + 1).fits
    assert costs.largest_batch([Block(128, 128)], deployment) == 1024


@pytest.mark.parametrize(("gpu", "most"), [("H100", 1024), ("H200", 1024), ("B200", 1024), ("A100", 256), ("cpu", 256)])
def test_a_device_has_its_own_most_sequences(gpu: str, most: int) -> None:
    """One layer of one window: memory would hold thousands of requests on each device."""
    scenario, blocks = Scenario(gpu, 1, 100, 10, kv_dtype="bfloat16"), [Block(8, 128)]
    costs = CostModel(SHAPE, scenario, Clock())
    (deployment,) = costs.deployments()
    assert costs.largest_batch(blocks, deployment) == most == costs.max_sequences == costs.engine.max_sequences
    assert costs.best(blocks).batch_size <= most
    limited = CostModel(SHAPE, scenario, Clock(), ServingEngine(max_sequences=300))
    assert limited.largest_batch(blocks, deployment) == 300


def test_a_fixed_batch_is_kept() -> None:
    costs = CostModel(SHAPE, replace(SCENARIO, batch_size=7, tensor_parallel=4), Clock())
    best = costs.best(parent_blocks(PARENT_120B))
    assert (best.batch_size, best.deployment) == (7, Deployment(4, 1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": "H1000"}, "unknown GPU 'H1000'; allowed: .*H100"),
        ({"generated_tokens": 0}, "generates 0 tokens"),
        ({"tensor_parallel": 3}, "no tensor parallelism"),
        ({"tensor_parallel": 2, "expert_parallel": 4}, "no tensor parallelism"),
        ({"num_gpus": 128, "tensor_parallel": 128}, "no tensor parallelism"),
    ],
)
def test_impossible_scenarios(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostModel(SHAPE, replace(SCENARIO, **change), Clock())


def test_impossible_blocks_and_models() -> None:
    costs = CostModel(SHAPE, replace(SCENARIO, tensor_parallel=8, expert_parallel=8), Clock())
    (deployment,) = costs.deployments()
    with pytest.raises(ValueError, match="12 experts cannot be split over 8"):
        costs.block(Block(12, None), deployment, 1)
    small = CostModel(SHAPE, Scenario("H100", 1, 4000, 4000, expert_dtype="bfloat16"), Clock())
    with pytest.raises(ValueError, match=r"does not fit 1 x H100 with 1 requests.*needs 217\.\d of 67\.3 usable GiB"):
        small.best(parent_blocks(PARENT_120B))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_sequences": 0}, "max_sequences"),
        ({"graph_sequences": -1}, "graph_sequences must not be negative"),
    ],
)
def test_impossible_engines(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServingEngine(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"utilization": 1.2}, r"utilization must be in \(0, 1\]"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"reserved_gib": -1.0}, "reserved_gib must not be negative"),
        ({"activation_factors": (1.0,)}, "3 numbers"),
        ({"activation_factors": (1.0, math.nan, 1.0)}, r"activation_factors\[1\] must not be negative"),
    ],
)
def test_impossible_memory(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineMemory(**settings)


def test_impossible_step() -> None:
    with pytest.raises(ValueError, match="EngineStep: overhead_seconds must not be negative"):
        EngineStep(overhead_seconds=-1.0)
