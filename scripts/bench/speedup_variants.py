"""Bench: what the predicted speed-ups of gpt-oss-puzzle-88B are made of, and what they would be in other settings.

    python scripts/bench/speedup_variants.py

Prints, for parent and child at 64K/64K on 8 H100 and 8 B200, where the milliseconds of a decoding step go in every
tensor parallelism (its largest batch), with the prompts read meanwhile; the throughputs of both models in the same
tensor parallelism, each with its best batch; then the six speed-ups of published_speedups.py and their errors in each
of `VARIANTS`. The last line is JSON: `steps`, `deployments` and `errors`.

Source: published_speedups.py; the command of the model card of gpt-oss-puzzle-88B sets MXFP8 inputs on B200 and a
memory utilization of 0.95; the factors are the checks of the laws of extrapolation in docs/costs.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from published_speedups import BRANCH, CHILD, ENGINE, MODEL, PARENT, PUBLISHED, SCENARIOS, STOCK, predict, speedup

from lit_puzzle.costs.accounting import mean_over_steps
from lit_puzzle.costs.attention_laws import DecodeAttention
from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.engine import EngineMemory, ServingEngine
from lit_puzzle.costs.kernel_laws import Experts
from lit_puzzle.costs.kernel_tables import find_system
from lit_puzzle.costs.measured_kernels import Collectives, MeasuredKernels
from lit_puzzle.costs.serving import Block, Deployment, KernelTimes, Setting

WINDOWS = {None: "full", 8192: "8192", 128: "128"}


@functools.cache
def tables(gpu: str, ranks: int, replicas: int) -> tuple[DecodeAttention, Experts, Collectives]:
    """Return the tables of one deployment, FP8 KV cache."""
    system, deployment = find_system(gpu), Deployment(ranks, 1, replicas)
    return (
        DecodeAttention.load(system, MODEL, ranks, "fp8"),
        Experts.load(system, MODEL, deployment, ("mxfp4", "bfloat16"), MeasuredKernels.distribution),
        Collectives.load(system, ranks),
    )


@dataclass(frozen=True)
class Scaled(MeasuredKernels):
    """Measured kernels with some of a decoding step's times multiplied.

    Args:
        attention: factor of full attention, and of windows above 128.
        few_experts: factor of the experts of layers that keep 64, which are interpolated.
    """

    name: ClassVar[str] = "scaled kernels"
    attention: float = 1.0
    few_experts: float = 1.0

    def decode_layer(self, setting: Setting, block: Block, batch_size: int, context_tokens: float) -> float:
        """Return the seconds of one decode step of one layer."""
        deployment = setting.deployment
        attention, experts, _ = tables(setting.scenario.gpu, deployment.tensor_parallel, deployment.replicas)
        seconds = super().decode_layer(setting, block, batch_size, context_tokens)
        if block.window_tokens != 128:
            seconds += (self.attention - 1) * attention.at(block.window_tokens, batch_size, context_tokens)
        if block.num_experts == 64:
            seconds += (self.few_experts - 1) * experts.at(64, batch_size)
        return seconds


def _kv(**changes: Any) -> ServingEngine:
    return dataclasses.replace(ENGINE, kv=dataclasses.replace(BRANCH, **changes))


def _sequences(count: int) -> ServingEngine:
    return dataclasses.replace(ENGINE, max_sequences=count)


MEASURED, MXFP8 = MeasuredKernels(), MeasuredKernels(expert_inputs="mxfp8")
FULLER = dataclasses.replace(ENGINE, memory=EngineMemory(utilization=0.95))
VARIANTS: dict[str, tuple[KernelTimes, KernelTimes, ServingEngine]] = {  # times on H100, times on B200, engine
    "as in published_speedups.py": (MEASURED, MEASURED, ENGINE),
    "KV cache without padding": (MEASURED, MEASURED, _kv(allocator="ideal")),
    "KV cache of stock vLLM": (MEASURED, MEASURED, STOCK),
    "KV cache grouped for contexts of 8192": (MEASURED, MEASURED, _kv(context_tokens=8192)),
    "requests started at different times": (MEASURED, MEASURED, _kv(requests="staggered")),
    "MXFP8 inputs on B200 (model card)": (MEASURED, MXFP8, ENGINE),
    "memory utilization 0.95 (model card)": (MEASURED, MEASURED, FULLER),
    "both of the model card": (MEASURED, MXFP8, FULLER),
    "128 sequences": (MEASURED, MEASURED, _sequences(128)),
    "192 sequences": (MEASURED, MEASURED, _sequences(192)),
    "512 sequences": (MEASURED, MEASURED, _sequences(512)),
    "1024 sequences": (MEASURED, MEASURED, _sequences(1024)),
    "attention, not of window 128, x 0.93": (Scaled(attention=0.93), Scaled(attention=0.93), ENGINE),
    "attention, not of window 128, x 1.07": (Scaled(attention=1.07), Scaled(attention=1.07), ENGINE),
    "layers of 64 experts x 0.85": (Scaled(few_experts=0.85), Scaled(few_experts=0.85), ENGINE),
    "layers of 64 experts x 1.27": (Scaled(few_experts=1.27), Scaled(few_experts=1.27), ENGINE),
    "experts balanced": (MeasuredKernels("balanced"), MeasuredKernels("balanced"), ENGINE),
}


def parts(costs: CostModel, blocks: tuple[Block, ...], deployment: Deployment, batch: int) -> dict[str, float]:
    """Return the seconds of a decoding step by kernel, and of the prompts read in its time."""
    found = costs.predict(blocks, deployment, batch)
    scenario, generated = costs.scenario, costs.scenario.generated_tokens
    attention, experts, collectives = tables(scenario.gpu, deployment.tensor_parallel, deployment.replicas)
    seconds: defaultdict[str, float] = defaultdict(float)
    for block, count in Counter(blocks).items():
        window = block.window_tokens
        mean = mean_over_steps(scenario, window, functools.partial(attention.at, window, batch))
        seconds[f"attention {WINDOWS[window]}"] += count * mean
        seconds["experts"] += count * experts.at(block.num_experts, batch)
        seconds["all-reduce"] += 2 * count * collectives.reduce(batch * MODEL.hidden, graph=True)
    seconds["products, small kernels, head, sampling, overhead"] = found.step_seconds - sum(seconds.values())
    seconds["prompts"] = found.latency_seconds / generated - found.step_seconds
    return seconds


def steps() -> Iterator[dict[str, Any]]:
    """Print and yield where the time goes, at 64K/64K on 8 GPUs."""
    for name in ("8xH100 64K/64K", "8xB200 64K/64K"):
        costs = CostModel(MODEL, SCENARIOS[name], MEASURED, ENGINE)
        for model, blocks in (("parent", PARENT), ("child", CHILD)):
            best = costs.best(blocks).deployment
            for deployment in costs.deployments():
                batch = costs.largest_batch(blocks, deployment)
                milliseconds = {part: round(1e3 * s, 2) for part, s in parts(costs, blocks, deployment, batch).items()}
                speed = round(costs.predict(blocks, deployment, batch).tokens_per_second)
                where = f"{name} {model:6s} {deployment.replicas} x TP{deployment.tensor_parallel} x {batch}"
                print(f"{where:34s} {'best' if deployment == best else '    '} {speed:6d} tokens/s, ms: {milliseconds}")
                yield {"where": where, "tokens_per_second": speed, "milliseconds": milliseconds}


def deployments() -> Iterator[dict[str, Any]]:
    """Print and yield both models in the same tensor parallelism, on 8 GPUs."""
    for name, scenario in SCENARIOS.items():
        for each in CostModel(MODEL, scenario, MEASURED, ENGINE).deployments() if scenario.num_gpus > 1 else ():
            where = f"{name} {each.replicas} x TP{each.tensor_parallel}"
            parent, child = predict(
                dataclasses.replace(scenario, tensor_parallel=each.tensor_parallel), MEASURED, ENGINE
            )
            speeds = [round(found.tokens_per_second) for found in (parent, child)]
            error = speeds[1] / speeds[0] / PUBLISHED[name][2] - 1
            print(f"{where:34s} {speeds[0]} -> {speeds[1]} = {speeds[1] / speeds[0]:.3f} ({error:+.1%})")
            yield {"where": where, "tokens_per_second": speeds, "error": round(error, 4)}


def errors() -> dict[str, dict[str, float | None]]:
    """Print the speed-ups of every variant and return their relative errors; None where a model does not fit."""
    print("\nspeed-up and error" + " " * 21 + "".join(f"{name:>17s}" for name in SCENARIOS))
    found: dict[str, dict[str, float | None]] = {}
    for label, (h100, b200, engine) in VARIANTS.items():
        found[label], cells = {}, ""
        for name, scenario in SCENARIOS.items():
            ratio = speedup(scenario, h100 if scenario.gpu == "H100" else b200, engine)
            error = None if ratio is None else round(ratio / PUBLISHED[name][2] - 1, 4)
            found[label][name] = error
            cells += f"{'does not fit' if error is None else f'{ratio:.2f} ({error:+.1%})':>17s}"
        print(f"  {label:37s}{cells}")
    return found


if __name__ == "__main__":
    print(json.dumps({"steps": list(steps()), "deployments": list(deployments()), "errors": errors()}))
