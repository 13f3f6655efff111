"""Bench: parent against child in a real vLLM, and the cost model's prediction for this CPU.

    python scripts/bench/vllm_speed.py [--pair benchmark|tiny] [--rounds 5] [--table runs/blocks.json]

benchmark: 105M random parameters with the proportions of gpt-oss (32 experts, 4 for a token, every other layer with a
window of 128), and a child with half the experts and one of four full-attention layers left; tiny: the embedded parent
and child. Both engines (float32, one thread, one core) run in processes of vLLM's own environment and take turns on
each workload; the first turn is warm-up. Prompts are random and differ between turns, so no prefix is cached.
Medians of CPU and wall seconds. The prediction is the cost model's speed-up at the same batch and lengths from the
roofline of `gpus.json` and, with --table, from blocks timed on this machine by `scripts/measure_blocks.py` (its command
is in docs/results.md).

Needs `bash scripts/vllm_env.sh`. Ends with one JSON line.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAIRS: dict[str, dict[str, tuple[int, int, int]]] = {  # workload -> requests, prompt tokens, generated tokens
    "benchmark": {"decode": (32, 64, 96), "prefill": (8, 1024, 1), "long": (8, 3000, 64)},
    "tiny": {"decode": (32, 64, 96), "prefill": (8, 1024, 1), "long": (8, 3000, 64)},
}
BLOCKS: list[tuple[int, int | None]] = [
    (32, 128),
    (16, None),
    (16, 128),
    (8, 256),
    (24, 128),
    (16, 256),
    (8, 128),
    (8, 256),
]  # of the benchmark child: 128 of 256 experts
CACHE_BYTES = 2**30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pair", choices=PAIRS, default="benchmark")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", type=Path, default=Path(".venv-vllm/bin/python"))
    parser.add_argument("--table", type=Path, help="of scripts/measure_blocks.py, for this shape")
    parser.add_argument("--folder", type=Path, help="folder in which the benchmark pair is kept")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        parent, child = tiny_pair() if arguments.pair == "tiny" else benchmark_pair(folder)
        report(parent, child, arguments)


def serve(model: Path) -> None:
    """Run the workloads named on standard input, in vLLM's environment; print one JSON line each."""
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 4096, "kv_cache_memory_bytes": CACHE_BYTES}
    engine = LLM(str(model), skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False, **settings)
    print("ready", flush=True)
    for line in sys.stdin:
        seed, requests, prompt_tokens, generated_tokens = map(int, line.split())
        draw = random.Random(seed)
        rows = [[draw.randrange(8, 128) for _ in range(prompt_tokens)] for _ in range(requests)]
        sampling = SamplingParams(temperature=0, max_tokens=generated_tokens, ignore_eos=True, detokenize=False)
        wall, cpu = time.perf_counter(), time.process_time()
        engine.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print("done", json.dumps(seconds), flush=True)


class Served:
    """Engine in a process of vLLM's environment."""

    def __init__(self, python: Path, model: Path) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the engine runs)
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "TORCHDYNAMO_DISABLE": "1"}
        settings |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
        self._process = subprocess.Popen(
            [str(python), __file__, "--serve", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | settings | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        self._read_line("ready")

    def _read_line(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        self._log.seek(0)
        raise SystemExit(f"the engine ended with code {self._process.wait()}:\n{self._log.read()[-3000:]}")

    def run(self, seed: int, workload: tuple[int, int, int]) -> dict[str, float]:
        """Return CPU and wall-clock seconds of a workload."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, (seed, *workload))) + "\n")
        self._process.stdin.flush()
        seconds: dict[str, float] = json.loads(self._read_line("done"))
        return seconds

    def end(self) -> None:
        """End the engine."""
        self._process.kill()
        self._process.wait()


def tiny_pair() -> tuple[Path, Path]:
    from lit_puzzle.run.folder import PACKAGE

    return PACKAGE / "assets" / "tiny_parent", PACKAGE / "assets" / "tiny_child"


def benchmark_pair(folder: Path) -> tuple[Path, Path]:
    """Return a plain gpt-oss parent and its child, both with the same random weights."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from lit_puzzle.child.assemble import assemble
    from lit_puzzle.model.checkpoint import fingerprint
    from lit_puzzle.spec import BlockSpec, Plan

    parent, run = folder / "parent", folder / "assembled"
    if not (run / "child").is_dir():
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 4096}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 128}
        experts = {"num_local_experts": 32, "num_experts_per_tok": 4}
        GptOssForCausalLM(GptOssConfig(**sizes, **heads, **experts)).save_pretrained(parent)
        draw = random.Random(0)
        blocks = tuple(BlockSpec(tuple(sorted(draw.sample(range(32), kept))), window) for kept, window in BLOCKS)
        Plan(fingerprint(parent), 32, blocks).save(folder / "plan.json")
        assemble(run, parent, plan=folder / "plan.json")
    return parent, run / "child"


def report(parent: Path, child: Path, arguments: argparse.Namespace) -> None:
    engines = {"parent": Served(arguments.python, parent), "child": Served(arguments.python, child)}
    line: dict[str, Any] = {"name": "vllm_speed", "pair": arguments.pair}
    try:
        for name, workload in PAIRS[arguments.pair].items():
            taken: dict[str, list[dict[str, float]]] = {side: [] for side in engines}
            for turn in range(arguments.rounds + 1):
                for side, engine in list(engines.items())[:: 1 if turn % 2 else -1]:
                    taken[side].append(engine.run(turn, workload))
            line[name] = compare({side: rounds[1:] for side, rounds in taken.items()})
            line[name]["predicted"] = predicted(parent, child, workload, arguments.table)
            show(name, workload, line[name])
    finally:
        for engine in engines.values():
            engine.end()
    print(json.dumps(line))


def compare(taken: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return medians, the median of the rounds' speed-ups, and their range."""
    found: dict[str, Any] = {}
    for clock in ("cpu", "wall"):
        seconds = {side: [one[clock] for one in rounds] for side, rounds in taken.items()}
        speedups = [parent / child for parent, child in zip(seconds["parent"], seconds["child"], strict=True)]
        found[clock] = {side: statistics.median(values) for side, values in seconds.items()}
        found[clock] |= {"speedup": statistics.median(speedups), "range": [min(speedups), max(speedups)]}
    return found


def predicted(parent: Path, child: Path, workload: tuple[int, int, int], table: Path | None) -> dict[str, float]:
    """Return the speed-up of throughput at this batch size and these lengths, by source of times."""
    from lit_puzzle.costs.cost_model import CostModel
    from lit_puzzle.costs.engine import ServingEngine
    from lit_puzzle.costs.model_shape import ModelShape
    from lit_puzzle.costs.roofline import Roofline
    from lit_puzzle.costs.serving import KernelTimes, parent_blocks
    from lit_puzzle.costs.timed_blocks import TimedBlocks
    from lit_puzzle.spec import Scenario

    configs = [json.loads((folder / "config.json").read_text()) for folder in (parent, child)]
    requests, prompt, generated = workload
    scenario = Scenario(
        "cpu", 1, prompt, generated, requests, kv_dtype="float32", weight_dtype="float32", expert_dtype="float32"
    )
    sources: list[KernelTimes] = [Roofline(), *([TimedBlocks(table)] if table is not None else [])]
    found = {}
    for times in sources:
        costs = CostModel(ModelShape.from_config(configs[0]), scenario, times, ServingEngine())
        old, new = (costs.best(parent_blocks(config)).tokens_per_second for config in configs)
        found[times.name] = new / old
    return found


def show(name: str, workload: tuple[int, int, int], found: dict[str, Any]) -> None:
    requests, prompt, generated = workload
    cpu, speedups = found["cpu"], found["predicted"]
    errors = ", ".join(
        f"{source} {value:.2f} ({value / cpu['speedup'] - 1:+.0%})" for source, value in speedups.items()
    )
    print(
        f"{name:8s} {requests} x ({prompt} + {generated}): parent {cpu['parent']:.2f}, child {cpu['child']:.2f} CPU s, "
        f"speed-up {cpu['speedup']:.2f} ({cpu['range'][0]:.2f} to {cpu['range'][1]:.2f}), of wall seconds "
        f"{found['wall']['speedup']:.2f}; predicted: {errors}",
        flush=True,
    )


if __name__ == "__main__":
    main()
