"""measured_kernels.py and the tables below it: sums of rows read independently, laws against what was measured."""

import importlib.util
import itertools
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from lit_puzzle.costs import kernel_tables
from lit_puzzle.costs.accounting import distinct_experts
from lit_puzzle.costs.attention_laws import DecodeAttention, PrefillAttention, quadratic
from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.engine import EngineStep, ServingEngine
from lit_puzzle.costs.kernel_laws import Experts, load_products
from lit_puzzle.costs.kernel_tables import Curve, data_folder, find_system, mix, read_rows
from lit_puzzle.costs.measured_kernels import Collectives, MeasuredKernels
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.serving import Block, Deployment, Setting
from lit_puzzle.spec import Scenario

SHAPE = ModelShape.from_config(
    {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201088,
        "num_experts_per_tok": 4,
    }
)
H100 = find_system("H100")
NO_OVERHEAD = ServingEngine(
    step=EngineStep(overhead_seconds=0.0, sampling_bytes=0.0, small_kernels=0, small_kernel_bandwidth=1e30)
)


def rows(path: str, **wanted: Any) -> list[dict[str, Any]]:
    """Rows read without our reader."""
    return parquet.read_table(
        data_folder() / path, filters=[(key, "=", value) for key, value in wanted.items()]
    ).to_pylist()


def setting(ranks: int = 1, gpu: str = "H100", engine: ServingEngine = NO_OVERHEAD, **scenario: Any) -> Setting:
    return Setting(SHAPE, Scenario(gpu, ranks, 4096, 4096, **scenario), Deployment(ranks, 1, 1), engine)


def test_slower_experts_bound_prompts_and_leave_decoding() -> None:
    """8192 tokens of 4 experts, 6 x 2880^2 operations each, at 100 TFLOP/s on each of 2 ranks."""
    measured, slower = MeasuredKernels(), MeasuredKernels(expert_flops=1e14)
    two, block = setting(2), Block(128, 128)
    tables = Experts.load(H100, SHAPE, Deployment(2, 1, 1), ("mxfp4", "bfloat16"), "power_law_1.01")
    lost = 8192 * 4 * 6 * 2880**2 / 2 / 1e14 - tables.at(128, 8192)
    assert lost > 0
    assert slower.prefill_layer(two, block, 8192) - measured.prefill_layer(two, block, 8192) == pytest.approx(lost)
    assert slower.decode_layer(two, block, 64, 4096) == measured.decode_layer(two, block, 64, 4096)
    with pytest.raises(ValueError, match="expert_flops must be positive, got 0"):
        MeasuredKernels(expert_flops=0)


def test_a_decode_layer_is_the_sum_of_its_rows() -> None:
    """8 ranks, 256 sequences, 4096 tokens: every kernel but the products (interpolated in 2880) is one row."""
    folder = "h100_sxm/{}/vllm/0.24.0/{}_perf.parquet"
    attention = rows(
        folder.format("attention", "generation_attention"),
        head_dim=64, num_heads=8, num_key_value_heads=1, kv_cache_dtype="fp8", window_size=0, batch_size=256, step=4095,
    )  # fmt: skip
    experts = rows(
        folder.format("moe", "moe"),
        hidden_size=2880, inter_size=2880, topk=4, moe_tp_size=8, moe_ep_size=1, moe_dtype="w4a16_mxfp4",
        distribution="power_law_1.01", num_experts=128, num_tokens=256,
    )  # fmt: skip
    assert len(attention) == len(experts) == 1
    points = {
        row["message_size"]: row["latency"]
        for row in rows(folder.format("comm", "custom_allreduce"), num_gpus=8, backend="vllm_graph")
    }
    share = (256 * 2880 - 2**19) / 2**19
    reduce = (1 - share) * points[2**19] + share * points[2**20]

    def product(out: int, inside: int) -> float:
        (row,) = rows(folder.format("gemm", "gemm"), gemm_dtype="bfloat16", m=256, n=out, k=inside)
        return row["latency"]

    a, b = (2880 - 2560) / 512, (640 - 512) / 256
    qkv = sum(p * q * product(n, k) for n, p in ((512, 1 - b), (768, b)) for k, q in ((2560, 1 - a), (3072, a)))
    output = (1 - a) * product(2560, 512) + a * product(3072, 512)
    router = (1 - a) * product(128, 2560) + a * product(128, 3072)
    by_hand = attention[0]["latency"] + experts[0]["latency"] + 2 * reduce + qkv + output + router
    predicted = MeasuredKernels().decode_layer(setting(8), Block(128, None), 256, 4096.0)
    assert predicted * 1e3 == pytest.approx(by_hand, rel=1e-9)


def test_curves_are_linear_between_points_and_end_with_them() -> None:
    curve = Curve.of("a table", "tokens", {1: 10.0, 4: 40.0, 2: 30.0})
    assert [curve.at(size) for size in (1, 1.5, 2, 3, 4)] == pytest.approx([0.010, 0.020, 0.030, 0.035, 0.040])
    assert curve.last_slope() == pytest.approx(0.005)
    for size in (0.99, 4.01):
        with pytest.raises(ValueError, match=f"a table: tokens {size:g} is outside the measured 1..4"):
            curve.at(size)
    with pytest.raises(ValueError, match="has no such rows"):
        Curve.of("a table", "tokens", {})
    other = Curve.of("a table", "tokens", {1: 20.0, 4: 80.0, 3: 1.0})
    assert mix([(0.5, curve), (0.25, other)]) == Curve("a table", "tokens", (1, 4), (0.010, 0.040))


@pytest.mark.parametrize("gpu", ["H100", "H200", "B200"])
def test_costs_are_ordered_as_physics_says(gpu: str) -> None:
    times, one, eight = MeasuredKernels(), setting(1, gpu), setting(8, gpu)
    for batch in (64, 256):
        by_experts = [times.decode_layer(one, Block(experts, 128), batch, 4096) for experts in (8, 16, 32, 64, 96, 128)]
        assert by_experts == sorted(by_experts)
        by_context = [times.decode_layer(one, Block(32, None), batch, 2.0**power) for power in range(8, 18)]
        assert all(after > 0.97 * before for before, after in itertools.pairwise(by_context))
    whole, shared = (times.decode_layer(each, Block(128, None), 64, 65536) for each in (one, eight))
    assert shared < whole / 3
    assert times.prefill_layer(one, Block(128, 128), 65536) < times.prefill_layer(one, Block(128, None), 65536)
    assert times.decode_rest(eight, 64) < times.decode_rest(one, 64)


def test_a_window_that_was_not_measured_is_a_shorter_context_and_costs_more_beyond() -> None:
    attention = DecodeAttention.load(H100, SHAPE, 8, "fp8")
    full = attention.at(None, 32, 8192.0)
    assert attention.at(8192, 32, 5000.0) == attention.at(None, 32, 5000.0)
    assert attention.at(8192, 32, 8192.0) == full
    # One key-value head and 32 sequences: so many were measured with heads of 128, by 5 query heads on each.
    heads = {"head_dim": 128, "num_heads": 5, "num_key_value_heads": 1, "batch_size": 32, "kv_cache_dtype": "fp8"}
    path = "h100_sxm/attention/vllm/0.24.0/generation_attention_perf.parquet"
    ratios = []
    for queries, keys, batch in ((5, 1, 32), (10, 2, 16), (20, 4, 8), (40, 8, 4)):
        heads |= {"num_heads": queries, "num_key_value_heads": keys, "batch_size": batch}
        (windowed,), (short,) = (
            rows(path, window_size=8192, step=16383, **heads),
            rows(path, window_size=0, step=8191, **heads),
        )
        ratios.append(windowed["latency"] / short["latency"])
    assert statistics.median(ratios) > 1.4
    assert attention.at(8192, 32, 100_000.0) == pytest.approx(full * statistics.median(ratios))
    assert attention.at(8192, 2048, 100_000.0) > attention.at(None, 2048, 8192.0)  # more than were measured
    assert attention.at(8192, 32, 100_000.0) == attention.at(8192, 32, 9000.0)


@pytest.mark.parametrize(("gpu", "kv_dtype"), [("H100", "fp8"), ("H100", "bfloat16"), ("H200", "fp8"), ("B200", "fp8")])
def test_attention_is_extrapolated_linearly(gpu: str, kv_dtype: str) -> None:
    """The law, fitted without the longest measured context, predicts it."""
    errors = []
    for ranks in (1, 2, 4, 8):
        for curve in DecodeAttention.load(find_system(gpu), SHAPE, ranks, kv_dtype).windows[0].values():
            if len(curve.sizes) > 3 and curve.seconds[-1] > 5e-5:  # memory traffic, not only launches
                shorter = Curve(curve.table, curve.size, curve.sizes[:-1], curve.seconds[:-1])
                predicted = shorter.seconds[-1] + shorter.last_slope() * (curve.sizes[-1] - shorter.sizes[-1])
                errors.append(abs(predicted / curve.seconds[-1] - 1))
    assert len(errors) > 10
    assert sum(errors) / len(errors) < 0.08


def test_prefill_is_extrapolated_by_its_pairs() -> None:
    attention = PrefillAttention.load(H100, SHAPE, 1, "fp8")
    full = attention.windows[0]
    assert 3.5 < attention.at(None, 32768) / attention.at(None, 16384) <= 4  # nearly the square
    assert attention.at(None, 16384.0001) == pytest.approx(attention.at(None, 16384))
    shorter = Curve("table", "prompt", full.sizes[:-1], full.seconds[:-1])
    predicted = quadratic(shorter, full.sizes[-1])  # the same law one point earlier, where the result was measured
    assert predicted == pytest.approx(full.seconds[-1], rel=0.12)
    # Window 8192 on 16384 tokens has three quarters of all pairs: 0.5 + 0.5 x 0.5 of the square's halves.
    assert attention.at(8192, 16384) == 3 * attention.at(None, 8192)
    assert attention.at(8192, 8192) == attention.at(None, 8192)
    doubled = attention.at(128, 32768) - attention.at(128, 16384)
    assert doubled == pytest.approx(attention.at(128, 16384), rel=0.1)


def test_experts_with_mxfp8_inputs_are_measured_on_b200_alone() -> None:
    b200 = find_system("B200")
    plain, narrow = (
        Experts.load(b200, SHAPE, Deployment(1, 1, 1), ("mxfp4", inputs), "power_law_1.01")
        for inputs in ("bfloat16", "mxfp8")
    )
    assert all(narrow.at(128, tokens) < plain.at(128, tokens) for tokens in (1, 64, 4096))
    assert narrow.at(64, 64) < narrow.at(128, 64)
    with pytest.raises(ValueError, match="no measured kernels of mxfp4 experts with expert_inputs: mxfp8 in h100_sxm"):
        Experts.load(H100, SHAPE, Deployment(1, 1, 1), ("mxfp4", "mxfp8"), "power_law_1.01")
    with pytest.raises(ValueError, match="expert_inputs must be bfloat16 or mxfp8, got 'fp4'"):
        MeasuredKernels(expert_inputs="fp4")


def test_chunks_of_a_prompt_add_up() -> None:
    times, block = MeasuredKernels(), Block(128, 128)
    small = setting(1, engine=ServingEngine(chunk_tokens=1024))
    large = setting(1, engine=ServingEngine(chunk_tokens=4096))
    attention = PrefillAttention.load(H100, SHAPE, 1, "fp8").at(128, 4096)
    once = times.prefill_layer(small, block, 1024) - PrefillAttention.load(H100, SHAPE, 1, "fp8").at(128, 1024)
    assert times.prefill_layer(small, block, 4096) == pytest.approx(attention + 4 * once)
    assert times.prefill_layer(large, block, 4096) < times.prefill_layer(small, block, 4096)


def expert_curves(distribution: str, groups: int = 1, ranks: int = 1) -> Experts:
    return Experts.load(H100, SHAPE, Deployment(ranks, groups, 1), ("mxfp4", "bfloat16"), distribution)


def test_experts_between_measured_counts_follow_distinct_experts() -> None:
    experts = expert_curves("power_law_1.01")
    for tokens in (1, 16, 256, 8192):
        low, high = experts.at(32, tokens), experts.at(128, tokens)
        distinct = [distinct_experts(count, 4, tokens) for count in (32, 64, 128)]
        if tokens > 1:
            share = (distinct[1] - distinct[0]) / (distinct[2] - distinct[0])
            assert experts.at(64, tokens) == pytest.approx(low + share * (high - low))
        assert min(low, high) <= experts.at(64, tokens) <= max(low, high)


def test_few_experts_cost_what_expert_parallel_rows_measured() -> None:
    """A rank that holds 8 or 16 of 32 experts was measured: the same experts with the same tokens each.

    The balanced measurement of n tokens uses exactly min(4 n, E) experts, so only batches that use all of them are
    compared, and only those whose time is not mostly the gathering of other ranks' tokens.
    """
    ours = expert_curves("balanced")
    for groups, few in ((2, 16), (4, 8)):
        theirs = expert_curves("balanced", groups, groups).counts[32]
        errors = [ours.at(few, tokens) / theirs.at(groups * tokens) - 1 for tokens in (128, 256, 512, 1024, 2048)]
        assert all(abs(error) < 0.35 for error in errors), errors
        assert abs(sum(errors)) / len(errors) < 0.15


def test_collectives_are_the_measured_rows() -> None:
    assert Collectives.load(H100, 1).reduce(1e12, graph=True) == 0.0
    eight = Collectives.load(H100, 8)
    assert eight.reduce(2**20, graph=True) < eight.reduce(2**20, graph=False)
    (row,) = rows(
        "h100_sxm/comm/nccl/2.29.2/nccl_perf.parquet",
        op_name="all_gather", num_gpus=8, nccl_dtype="half", message_size=2**20,
    )  # fmt: skip
    assert eight.gather(2**20) == row["latency"] / 1e3


def test_the_head_is_wider_than_any_measured_matrix() -> None:
    products = load_products(H100, "bfloat16")
    assert products.at(131072, 2560, 64) == pytest.approx(2 * products.at(65536, 2560, 64))
    assert products.at(8, 2560, 64) == products.at(32, 2560, 64)
    with pytest.raises(ValueError, match=r"100000 columns; measured 32..65536"):
        products.at(128, 100000, 1)
    with pytest.raises(ValueError, match=r"tokens 40000 is outside the measured 1..32768"):
        products.at(128, 2560, 40000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": "cpu"}, "no measured kernels for GPU 'cpu'; allowed: .*H100"),
        ({"gpu": "A100", "kv_dtype": "bfloat16"}, "a100_sxm/attention.*has no columns .*window_size"),
        ({"kv_dtype": "float16"}, "no measured kernels with kv_dtype 'float16'; allowed"),
        ({"weight_dtype": "float32"}, "no measured kernels with weight_dtype 'float32'"),
        ({"expert_dtype": "bfloat16"}, "moe_perf.parquet has no rows with .*hidden_size 2880.*moe_dtype bfloat16"),
        ({"ranks": 64}, "no full attention|no rows|has no such rows"),
    ],
)
def test_formats_and_devices_without_measurements_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeasuredKernels().check(setting(**change))


def test_sizes_outside_the_measured_ones_are_refused() -> None:
    times, known = MeasuredKernels(), setting(1)
    with pytest.raises(ValueError, match="context of 140000 tokens; attention was measured up to 131072"):
        times.decode_layer(known, Block(128, None), 1, 140000.0)
    with pytest.raises(ValueError, match=r"3000 sequences; measured 1..\d+"):
        times.decode_layer(known, Block(128, None), 3000, 100.0)
    with pytest.raises(ValueError, match=r"256 experts; measured are .32, 128."):
        times.decode_layer(known, Block(256, None), 1, 100.0)
    with pytest.raises(ValueError, match=r"has no rows with .*distribution zipf"):
        MeasuredKernels("zipf").check(known)


def test_without_the_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "aiconfigurator_core" else real(name, *rest)
    )
    with pytest.raises(ValueError, match="gpu-tables"):
        data_folder()


def test_a_missing_table_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_tables, "data_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"no table nowhere.parquet"):
        read_rows("nowhere.parquet", ("m",), ())


def test_the_search_space_of_the_paper_has_costs_everywhere() -> None:
    """8 to 128 experts with and without windows, on all GPUs with tables, in every deployment on 8 GPUs."""
    for gpu in ("H100", "H200", "B200"):
        costs = CostModel(SHAPE, Scenario(gpu, 8, 2048, 2048), MeasuredKernels())
        seconds = defaultdict(list)
        for deployment in costs.deployments():
            for experts in (8, 16, 32, 64, 96, 128):
                for window in (None, 8192, 128):
                    for batch in (1, 7, 100, 1024):
                        cost = costs.block(Block(experts, window), deployment, batch)
                        seconds[batch].append(cost.decode_seconds)
        assert all(1e-5 < value < 1e-2 for values in seconds.values() for value in values)
