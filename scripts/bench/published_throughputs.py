"""Bench: the cost model against public measurements of gpt-oss-120b on vLLM.

    python scripts/bench/published_throughputs.py [--rows FILE.csv]

Every row is one closed-loop benchmark: prompts of 80 to 100% of `input_seq_len` tokens, as long completions of
`output_seq_len`, `concurrency` requests in flight on `tensor_parallel` GPUs. Predicted are, separately,

    throughput    tokens a second of each GPU: B G / (B x prefill + G x decode) / GPUs
    step          seconds per output token after the first
    first token   seconds to it; both from the closed loop of 10 x concurrency requests, simulated

with B = concurrency, or the requests that fit the memory if fewer, and lengths of 90%; the simulation
(`lit_puzzle.costs.closed_loop`) draws them. The setting is that of the benchmark (SemiAnalysis InferenceMAX, its
published server commands): asynchronous scheduling, chunks of 8192 tokens; on B200 FP8 KV cache and experts with MXFP8
inputs; on H100 and H200 experts by Marlin, whose rate, like the two constants of the front end, `first_token_fit.py`
fits to every second row's time to the first token.

--rows is a CSV file with the columns `gpu_model` (h100, h200, b200), `input_seq_len`, `output_seq_len`,
`tensor_parallel`, `concurrency`, `output_throughput_per_gpu` and, where known, `mean_time_to_first_token_sec` and
`mean_time_per_output_token_sec`; others are ignored. Without it: the figures below, rounded, of InferenceMAX's runs
(vLLM 0.13.0, 2 January 2026).

Prints every row, then errors by GPU, tensor parallelism, concurrency and lengths. The last line is JSON:
`mean_absolute_error` and `median_ratio` (predicted / measured throughput), `rows`, the same for `step` and
`first_token`, and `groups`. Needs the extra `gpu-tables`.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lit_puzzle.costs.closed_loop import FrontEnd, Latency, StepTimes, closed_loop
from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.engine import ServingEngine
from lit_puzzle.costs.gpus import gpus
from lit_puzzle.costs.kernel_tables import SYSTEMS
from lit_puzzle.costs.kv_layout import KVAllocation
from lit_puzzle.costs.measured_kernels import MeasuredKernels
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.serving import Block, Deployment, Setting
from lit_puzzle.model import planned_shape
from lit_puzzle.spec import Scenario

MODEL = ModelShape.from_config(planned_shape.PUBLISHED["120b"])
PARENT = tuple(Block(128, None if layer % 2 else 128) for layer in range(36))
COLUMNS = ("gpu_model", "input_seq_len", "output_seq_len", "tensor_parallel", "concurrency")
THROUGHPUT = "output_throughput_per_gpu"
TIMES = ("mean_time_to_first_token_sec", "mean_time_per_output_token_sec")
MOST = 10_000_000  # tokens or requests of a row
SHORTEST, WAVES = 0.8, 10  # random_range_ratio and num_prompts / concurrency, InferenceMAX
LENGTH_SHARE = (1 + SHORTEST) / 2
MARLIN_FLOPS = 190e12  # of each GPU: VLLM_MXFP4_USE_MARLIN=1 in InferenceMAX's commands; fitted by first_token_fit.py
READ_TOKENS = 64  # prompt tokens of a step are rounded to a multiple of this
# gpu_model, input_seq_len, output_seq_len, tensor_parallel, concurrency, tokens/s of each GPU, seconds to the first
# token and per output token: InferenceMAX, 2026-01-02, vLLM 0.13.0, MXFP4.
ROWS = [
    ("b200", 1024, 1024, 1, 4, 1010.9, 0.0448, 0.003799),
    ("b200", 1024, 1024, 1, 32, 3779.8, 0.0758, 0.008206),
    ("b200", 1024, 1024, 2, 4, 572.08, 0.0351, 0.003356),
    ("b200", 1024, 1024, 2, 32, 2690, 0.0499, 0.005749),
    ("b200", 1024, 8192, 1, 4, 1043.8, 0.0479, 0.003768),
    ("b200", 1024, 8192, 1, 32, 4052.9, 0.0732, 0.007697),
    ("b200", 1024, 8192, 2, 4, 581.18, 0.0374, 0.003383),
    ("b200", 1024, 8192, 2, 32, 2898.6, 0.0497, 0.005374),
    ("b200", 8192, 1024, 1, 4, 931.53, 0.105, 0.004089),
    ("b200", 8192, 1024, 1, 32, 3086.4, 0.24, 0.009869),
    ("b200", 8192, 1024, 2, 4, 533.09, 0.0819, 0.003577),
    ("b200", 8192, 1024, 2, 32, 2231.5, 0.175, 0.006785),
    ("h100", 1024, 1024, 2, 4, 370.26, 0.0564, 0.005195),
    ("h100", 1024, 1024, 2, 32, 1400.3, 0.111, 0.01106),
    ("h100", 1024, 1024, 4, 64, 1558.4, 0.113, 0.009896),
    ("h100", 1024, 1024, 8, 16, 399.67, 0.0442, 0.00485),
    ("h100", 1024, 8192, 2, 4, 384.71, 0.0629, 0.005114),
    ("h100", 1024, 8192, 2, 32, 1455.8, 0.111, 0.01072),
    ("h100", 1024, 8192, 4, 64, 1608.9, 0.108, 0.009681),
    ("h100", 1024, 8192, 8, 16, 418.81, 0.0456, 0.004647),
    ("h100", 8192, 1024, 2, 4, 324.88, 0.257, 0.005757),
    ("h100", 8192, 1024, 2, 32, 900.07, 0.58, 0.01682),
    ("h100", 8192, 1024, 4, 64, 886.58, 0.61, 0.01712),
    ("h100", 8192, 1024, 8, 16, 317.3, 0.188, 0.005914),
]


@dataclass(frozen=True)
class Run:
    """One benchmark.

    Attributes:
        gpu: key of gpus.json.
        lengths: longest prompt and completion in tokens.
        ranks: tensor parallelism.
        concurrency: requests in flight.
        throughput: measured tokens a second of each GPU.
        first_token: measured seconds to the first token; None where it is not known.
        step: measured seconds per output token; None where they are not known.
    """

    gpu: str
    lengths: tuple[int, int]
    ranks: int
    concurrency: int
    throughput: float
    first_token: float | None
    step: float | None


def read_rows(path: Path) -> list[Run]:
    """Read a CSV file.

    Raises:
        ValueError: a column is missing, or a value is not one; names file, row and column.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}; give a CSV file with the columns {[*COLUMNS, THROUGHPUT]}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream)
            names, rows = table.fieldnames or (), list(table)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from error
    missing = [name for name in (*COLUMNS, THROUGHPUT) if name not in names]
    if missing:
        raise ValueError(f"{path}, row 1: no column {missing[0]!r}; it has {list(names)}")
    runs = [_run(values, f"{path}, row {number}") for number, values in enumerate(rows, start=2)]
    if not runs:
        raise ValueError(f"{path} has no row beside its header")
    return runs


def _run(values: Mapping[str, str | None], where: str) -> Run:
    def number(name: str, whole: bool) -> float:
        try:
            value = float(values[name] or "")
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf) or (whole and (value != int(value) or value > MOST)):
            kind = f"whole number from 1 to {MOST:,}" if whole else "positive number"
            raise ValueError(f"{where}, column {name!r}: {values[name]!r} is not a {kind}")
        return value

    gpu = (values["gpu_model"] or "").upper()
    if gpu not in SYSTEMS or gpu == "A100":
        known = sorted(name.lower() for name in SYSTEMS if name in gpus() and name != "A100")
        raise ValueError(
            f"{where}, column 'gpu_model': {values['gpu_model']!r} has no measured kernels of this model; allowed: "
            f"{known}"
        )
    prompt, completion, ranks, concurrency = (int(number(name, True)) for name in COLUMNS[1:])
    first, step = (number(name, False) if values.get(name) else None for name in TIMES)
    return Run(gpu, (prompt, completion), ranks, concurrency, number(THROUGHPUT, False), first, step)


def carried() -> list[Run]:
    """Return the figures in this file."""
    return [Run(row[0].upper(), (row[1], row[2]), row[3], row[4], row[5], row[6], row[7]) for row in ROWS]


def predict(run: Run, front: FrontEnd | None = None, expert_flops: float | None = MARLIN_FLOPS) -> dict[str, float]:
    """Return throughput of each GPU, seconds per output token, and seconds to the first token.

    Args:
        run: the benchmark.
        front: seconds outside the engine; None: the fitted ones.
        expert_flops: rate of Marlin on H100 and H200; None: the measured kernels as they are.
    """
    prompt, generated = (round(LENGTH_SHARE * length) for length in run.lengths)
    blackwell = run.gpu == "B200"
    scenario = Scenario(
        run.gpu,
        run.ranks,
        prompt,
        generated,
        batch_size=run.concurrency,
        kv_dtype="fp8" if blackwell else "bfloat16",
        tensor_parallel=run.ranks,
    )
    times = MeasuredKernels(expert_inputs="mxfp8") if blackwell else MeasuredKernels(expert_flops=expert_flops)
    costs = CostModel(MODEL, scenario, times, ServingEngine(kv=KVAllocation("ideal")))
    (deployment,) = costs.deployments()
    requests = min(run.concurrency, max(1, costs.largest_batch(PARENT, deployment)))  # the others wait
    found = costs.predict(PARENT, deployment, requests)
    latency = simulate(run, costs, deployment, requests, front)
    return {
        "throughput": found.tokens_per_second / run.ranks,
        "step": latency.output_token,
        "first_token": latency.first_token,
    }


def simulate(run: Run, costs: CostModel, deployment: Deployment, requests: int, front: FrontEnd | None) -> Latency:
    """Return the latencies of the closed loop, of which at most `requests` are in the engine."""
    setting = Setting(MODEL, costs.scenario, deployment, costs.engine)

    @functools.cache
    def decode(sequences: int) -> float:
        return costs.predict(PARENT, deployment, sequences).step_seconds

    @functools.cache
    def prefill(tokens: int) -> float:
        layers = sum(costs.times.prefill_layer(setting, block, tokens) for block in PARENT)
        return layers + costs.times.prefill_rest(setting, tokens)

    def read(tokens: int) -> float:
        whole = costs.scenario.prompt_tokens
        if whole > costs.engine.chunk_tokens:  # later chunks attend to the earlier ones
            return prefill(whole) * tokens / whole
        return prefill(max(1, round(tokens / READ_TOKENS)) * READ_TOKENS)

    draw, count = random.Random(0), WAVES * run.concurrency
    prompts, generated = (
        [draw.randint(math.ceil(SHORTEST * length), length) for _ in range(count)] for length in run.lengths
    )
    times = StepTimes(decode, read, costs.engine.chunk_tokens, requests)
    return closed_loop(prompts, generated, run.concurrency, times, front)


def summary(ratios: Iterable[float]) -> dict[str, float]:
    """Return the mean absolute error and the median of predicted / measured."""
    values = list(ratios)
    error = statistics.mean(abs(value - 1) for value in values)
    return {
        "mean_absolute_error": round(error, 4),
        "median_ratio": round(statistics.median(values), 4),
        "rows": len(values),
    }


GROUPS: dict[str, Callable[[Run], str]] = {
    "GPU": lambda run: run.gpu,
    "tensor parallel": lambda run: f"{run.gpu} x {run.ranks}",
    "concurrency": lambda run: str(run.concurrency),
    "lengths": lambda run: f"{run.lengths[0]}/{run.lengths[1]}",
}


def main(path: Path | None) -> None:
    runs = carried() if path is None else read_rows(path)
    found = []
    for number, run in enumerate(runs, start=2):
        try:
            found.append(predict(run))
        except ValueError as error:
            raise ValueError(f"{path or 'carried figures'}, row {number}: {error}") from error
    print("gpu   TP  lengths     conc   tokens/s/GPU  predicted  ratio    step ms  predicted   first ms  predicted")
    for run, guess in zip(runs, found, strict=True):
        step, first = ("" if value is None else f"{1e3 * value:.2f}" for value in (run.step, run.first_token))
        print(
            f"{run.gpu:5s} {run.ranks:2d}  {run.lengths[0]:5d}/{run.lengths[1]:<5d} {run.concurrency:4d}  "
            f"{run.throughput:12.1f} {guess['throughput']:10.1f}  {guess['throughput'] / run.throughput:5.2f} "
            f"{step:>10s} {1e3 * guess['step']:10.2f} {first:>10s} {1e3 * guess['first_token']:10.2f}"
        )
    ratios: dict[str, list[float]] = defaultdict(list)
    groups: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in GROUPS}
    for run, guess in zip(runs, found, strict=True):
        for name, measured in (("throughput", run.throughput), ("step", run.step), ("first_token", run.first_token)):
            if measured is not None:
                ratios[name].append(guess[name] / measured)
        for name, key in GROUPS.items():
            groups[name][key(run)].append(ratios["throughput"][-1])
    summaries = {name: {key: summary(values) for key, values in sorted(of.items())} for name, of in groups.items()}
    for name, of in summaries.items():
        print(
            f"\nby {name}: " + "; ".join(f"{key} {v['mean_absolute_error']:.1%} ({v['rows']})" for key, v in of.items())
        )
    others = {name: summary(ratios[name]) for name in ("step", "first_token") if ratios[name]}
    print(json.dumps(summary(ratios["throughput"]) | others | {"groups": summaries}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path)
    try:
        main(parser.parse_args().rows)
    except ValueError as error:
        sys.exit(f"error: {error}")
