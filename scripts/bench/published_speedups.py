"""Predict the published speed-ups of gpt-oss-puzzle-88B over gpt-oss-120B, from measured kernels and from the roofline.

    python scripts/bench/published_speedups.py

Reads the tables of the extra `gpu-tables`, the released architecture's recipe and no checkpoint; writes nothing. Every
constant has its source beside its definition (`ServingEngine`, `Roofline`, `gpus.json`); the KV cache is that of the
branch of vLLM which the model card installs; `max_sequences` is taken from the parent's published throughputs. The
setting (requests in step, 256 sequences) was chosen after about a dozen variants had been compared with these six
speed-ups: it is no blind prediction; speedup_variants.py prints others.

Prints, for each scenario with FP8 KV cache, predicted and published throughputs
(tokens a second, parent and child, each with its own best tensor parallelism and batch size) and speed-ups, what the
same plan would gain with the KV cache as stock vLLM allocates it, then the speed-ups with each constant changed by a
quarter. `one_deployment` has both models in the same tensor parallelism: on H100 the one whose throughputs are nearest
to the published ones, on B200, for which no throughput is published, the one whose speed-ups are. The last line is
JSON: `predicted`, `stock_vllm`, `one_deployment` and `published` (throughputs and speed-ups by source and scenario) and
`error` and `error_one_deployment` (relative errors of the speed-up, measured kernels, all six scenarios).

Source: arXiv 2602.11937 and the release of gpt-oss-puzzle-88B: its architecture, its published throughputs, and the
command of its model card (vLLM's branch, contexts of 131072 tokens).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, TypeVar

from lit_puzzle.costs.block_cost import Prediction
from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.engine import EngineMemory, EngineStep, ServingEngine
from lit_puzzle.costs.kv_layout import KVAllocation
from lit_puzzle.costs.measured_kernels import MeasuredKernels
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.costs.serving import Block, KernelTimes
from lit_puzzle.model import planned_shape
from lit_puzzle.run.files import read_yaml
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.spec import Scenario

MODEL = ModelShape.from_config(planned_shape.PUBLISHED["120b"])
PARENT = tuple(Block(128, None if layer % 2 else 128) for layer in range(36))
RELEASED = PACKAGE / "recipes" / "gpt_oss_120b" / "assemble_released.yaml"
MANUAL = read_yaml(RELEASED)["manual"]
CHILD = tuple(
    Block(experts, MANUAL["windows"].get(layer, block.window_tokens))
    for layer, (experts, block) in enumerate(zip(MANUAL["experts"], PARENT, strict=True))
)

Owner = TypeVar("Owner", ServingEngine, EngineMemory, EngineStep, Roofline)

# A benchmark starts all requests at once. The paper does not name its engine's limits. max_sequences is the one
# constant taken from the published figures: the parent's 29.6K tokens/s at 4K/4K on 8 H100 say 256, vLLM's default for
# other GPUs, rather than 1024.
BRANCH = KVAllocation("vllm_weighted", context_tokens=131072, requests="in_step")
ENGINE = ServingEngine(max_sequences=256, kv=BRANCH)
STOCK = dataclasses.replace(ENGINE, kv=KVAllocation(requests="in_step"))

K = 1024
SCENARIOS = {
    "8xH100 64K/64K": Scenario("H100", 8, 64 * K, 64 * K),
    "8xH100 4K/4K": Scenario("H100", 8, 4 * K, 4 * K),
    "1xH100 64K/64K": Scenario("H100", 1, 64 * K, 64 * K),
    "1xH100 4K/4K": Scenario("H100", 1, 4 * K, 4 * K),
    "8xB200 64K/64K": Scenario("B200", 8, 64 * K, 64 * K),
    "8xB200 4K/4K": Scenario("B200", 8, 4 * K, 4 * K),
}
ONE_DEPLOYMENT = {"H100": 2, "B200": 4}  # tensor parallelism of both models on eight GPUs
# Tokens a second of parent and child, and the speed-up; on B200 only the latter is published.
PUBLISHED: dict[str, tuple[float | None, float | None, float]] = {
    "8xH100 64K/64K": (5700, 9300, 1.63),
    "8xH100 4K/4K": (29600, 36100, 1.22),
    "1xH100 64K/64K": (300, 800, 2.82),
    "1xH100 4K/4K": (1400, 3300, 2.44),
    "8xB200 64K/64K": (None, None, 1.40),
    "8xB200 4K/4K": (None, None, 1.15),
}
# Constants of the engine and of the roofline that predictions depend on; the others are counts or the GPU's own.
ENGINE_CONSTANTS = (
    "max_sequences",
    "chunk_tokens",
    "memory.utilization",
    "memory.tolerance",
    "memory.reserved_gib",
    "memory.activation_factors",
    "step.overhead_seconds",
    "step.sampling_bytes",
    "step.small_kernel_seconds",
    "step.small_kernel_bandwidth",
)
ROOFLINE_CONSTANTS = (
    "attention_bandwidth",
    "expert_bandwidth",
    "expert_arithmetic",
    "dense_bandwidth",
    "dense_arithmetic",
    "communication",
    "launch_seconds",
)
# Constants that are shares of a whole: at most 1.
SHARES = (*ROOFLINE_CONSTANTS[:-1], "utilization", "tolerance", "small_kernel_bandwidth")


def predict(scenario: Scenario, times: KernelTimes, engine: ServingEngine) -> tuple[Prediction, Prediction]:
    """Return the predictions of the highest throughput of parent and child."""
    costs = CostModel(MODEL, scenario, times, engine)
    return costs.best(PARENT), costs.best(CHILD)


def speedup(scenario: Scenario, times: KernelTimes, engine: ServingEngine) -> float | None:
    """Return the child's throughput over the parent's; None where one of them does not fit the memory."""
    try:
        parent, child = predict(scenario, times, engine)
    except ValueError:
        return None
    return child.tokens_per_second / parent.tokens_per_second


def compare(
    times: KernelTimes, scenarios: dict[str, Scenario], engine: ServingEngine = ENGINE
) -> dict[str, dict[str, float]]:
    """Print the table of one source of times and return throughputs and speed-ups by scenario."""
    print(
        f"\n{times.name}, KV cache {engine.kv.allocator}: predicted and published tokens/s, parent -> child, speed-up"
    )
    found: dict[str, dict[str, float]] = {}
    for name, scenario in scenarios.items():
        parent, child = predict(scenario, times, engine)
        ratio, (old, new, published) = child.tokens_per_second / parent.tokens_per_second, PUBLISHED[name]
        where = " -> ".join(f"TP{p.deployment.tensor_parallel} x {p.batch_size}" for p in (parent, child))
        speeds = f"{old:7.0f} -> {new:7.0f}" if old and new else "not published".rjust(18)
        print(
            f"  {name:15s} {parent.tokens_per_second:8.0f} -> {child.tokens_per_second:8.0f} = {ratio:4.2f}x"
            f"   published {speeds} = {published:4.2f}x   error {ratio / published - 1:+6.1%}   ({where})"
        )
        found[name] = {"parent": parent.tokens_per_second, "child": child.tokens_per_second, "speedup": ratio}
    return found


def changed(owner: Owner, name: str, factor: float) -> Owner:
    """Return the settings with one constant times `factor`; shares stay at or below 1, counts stay whole.

    Args:
        owner: settings that have the constant, or that have the settings that have it.
        name: the constant; dotted where it is one of nested settings.
        factor: what to multiply it by.
    """
    key, _, nested = name.partition(".")
    value: Any = vars(owner)[key]
    if nested:
        value = changed(value, nested, factor)
    elif isinstance(value, tuple):
        value = tuple(factor * number for number in value)
    elif isinstance(value, int):
        value = round(factor * value)
    elif key in SHARES:
        value = min(1.0, factor * value)
    else:
        value = factor * value
    changes: dict[str, Any] = {key: value}
    return dataclasses.replace(owner, **changes)


def variations(times: KernelTimes) -> Iterator[tuple[str, KernelTimes, ServingEngine]]:
    """Yield every constant of one source of times, a quarter less and a quarter more.

    The engine's constants are the same for both sources and are varied with the measured kernels only.
    """
    for name in () if isinstance(times, Roofline) else ENGINE_CONSTANTS:
        for factor in (0.75, 1.25):
            yield f"{name} x {factor}", times, changed(ENGINE, name, factor)
    if isinstance(times, Roofline):
        for name in ROOFLINE_CONSTANTS:
            for factor in (0.75, 1.25):
                yield f"{name} x {factor}", changed(times, name, factor), ENGINE
    else:
        for distribution in ("balanced", "power_law_1.2"):
            yield f"distribution {distribution}", MeasuredKernels(distribution), ENGINE


def sensitivity(times: KernelTimes, scenarios: dict[str, Scenario]) -> None:
    """Print the speed-ups under every variation."""
    print(f"\n{times.name}: speed-up when one constant changes by a quarter")
    print(" " * 38 + "".join(f"{name:>17s}" for name in scenarios))
    for label, source, engine in variations(times):
        ratios = (speedup(scenario, source, engine) for scenario in scenarios.values())
        print(
            f"  {label:36s}"
            + "".join(f"{'does not fit' if ratio is None else f'{ratio:.2f}':>17s}" for ratio in ratios)
        )


def errors(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the relative error of each speed-up."""
    return {name: round(found[name]["speedup"] / PUBLISHED[name][2] - 1, 4) for name in SCENARIOS}


def main() -> None:
    h100 = {name: scenario for name, scenario in SCENARIOS.items() if scenario.gpu == "H100"}
    sources: tuple[KernelTimes, ...] = (MeasuredKernels(), Roofline())
    predicted = {source.name: compare(source, SCENARIOS) for source in sources}
    stock = compare(MeasuredKernels(), SCENARIOS, STOCK)
    equal = {
        name: dataclasses.replace(each, tensor_parallel=min(each.num_gpus, ONE_DEPLOYMENT[each.gpu]))
        for name, each in SCENARIOS.items()
    }
    one_deployment = compare(MeasuredKernels(), equal)
    for source in sources:
        sensitivity(source, h100)
    published = {
        name: {key: value for key, value in zip(("parent", "child", "speedup"), numbers, strict=True) if value}
        for name, numbers in PUBLISHED.items()
    }
    found = {"predicted": predicted, "stock_vllm": stock, "one_deployment": one_deployment, "published": published}
    found |= {"error": errors(predicted[MeasuredKernels.name]), "error_one_deployment": errors(one_deployment)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
