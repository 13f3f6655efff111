"""Bench: time to a proven optimum at the shape of gpt-oss-120b, and time from `lightning run` to the solver.

    python scripts/bench/search.py [--runs 7]
    python scripts/bench/search.py --plans 3

36 layers, 12 candidates in each (6 expert counts x full or 8192-token window where attention is full, 12 expert counts
elsewhere), synthetic quality losses with another seed in every run, costs from the roofline, targets of
arXiv 2602.11937: on 8 x H100 at least 1.6 times the parent at 64K/64K and 1.2 times at 4K/4K.

    solve     one deployment and batch size per scenario: seconds of one proven solve                  goal 1
    product   8 batch sizes x 2 scenarios x every deployment: seconds until proven                      goal 10
    startup   `lightning run` of a recipe of this size, in a new process, to the solver's first line    goal 1
    recipe    `lightning run recipes/gpt_oss_120b/search.yaml` on a synthetic library and scores: measured kernels,
              refined batch sizes, alternatives and the sweep. Once; seconds of the whole command and of the solver, and
              how much was proven. Skipped without aiconfigurator-core (extra `gpu-tables`).

With `--plans N`, instead: which plan the paper's budgets give for N such libraries, where the engine pads its KV cache
as vLLM does, as the branch for gpt-oss-puzzle-88B does, and where it does not (`allocator: ideal`).

Prints medians of wall-clock and CPU seconds, and the slowest run; library and scores are in a temporary folder. Ends
with one JSON line.
"""

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.library.library import Candidate, Library, candidate_name, parent_blocks, parts
from lit_puzzle.scoring.scores import Measurement, Scores
from lit_puzzle.search.objective import Objective
from lit_puzzle.search.program import SearchProgram, build_program
from lit_puzzle.search.settings import Constraints, SearchSpace
from lit_puzzle.search.solver import mip
from lit_puzzle.spec import BlockSpec, Budget, Scenario, Target

RECIPE_120B = Path(__file__).parents[2] / "recipes" / "gpt_oss_120b" / "search.yaml"
COUNTS = (8, 16, 32, 64, 96, 128)
MORE_COUNTS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)  # 12 candidates in layers without a choice of window
WINDOW = 8192
BATCH_SIZES = [32, 48, 64, 96, 128, 160, 192, 256]
CONFIG = {
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
}
TARGETS = [
    Target(Scenario("H100", 8, 65536, 65536), Budget(throughput_over_parent=1.6)),
    Target(Scenario("H100", 8, 4096, 4096), Budget(throughput_over_parent=1.2)),
]
RECIPE = """command: search
run_dir: {folder}/run
library: {folder}/library
scores: {folder}/scores
costs: {{times: {{class_path: lit_puzzle.costs.roofline.Roofline}}}}
constraints:
  targets:
  - scenario: {{gpu: H100, num_gpus: 8, prompt_tokens: 65536, generated_tokens: 65536}}
    budget: {{throughput_over_parent: 1.6}}
  - scenario: {{gpu: H100, num_gpus: 8, prompt_tokens: 4096, generated_tokens: 4096}}
    budget: {{throughput_over_parent: 1.2}}
"""


def make_library(padded: bool = True, seed: int = 0) -> Library:
    """Return the 120B search space with a random order of importance of its experts."""
    generator, layers = random.Random(seed), []
    for own in parent_blocks(CONFIG):
        order = list(own.experts)
        generator.shuffle(order)
        windows = [None, WINDOW] if own.window_tokens is None else [own.window_tokens]
        counts = COUNTS if len(windows) > 1 or not padded else MORE_COUNTS
        blocks = [BlockSpec(tuple(sorted(order[:count])), window) for window in windows for count in counts]
        blocks.sort(key=lambda block: block != own)
        layers.append(tuple(Candidate(candidate_name(own, block), block) for block in blocks))
    return Library("made-up", 128, CONFIG, tuple(layers))


def make_scores(library: Library, seed: int = 0) -> Scores:
    """Return losses that grow with the pruned experts by a random factor per layer, and random losses of windows."""
    generator, entries = random.Random(seed), {}
    for layer, row in enumerate(library.layers):
        experts, window = generator.lognormvariate(-4, 0.7), generator.lognormvariate(-5, 1.5)
        for candidate in row:
            pruned = 1 - candidate.block.num_experts / 128
            names = {f"experts={candidate.block.num_experts}": experts * pruned**2 * generator.uniform(0.95, 1.05)}
            names |= {f"window={candidate.block.window_tokens}": window}
            for name, value in ((name, names[name]) for name in parts(candidate) if name is not None):
                entries[layer, name] = {
                    "kl": Measurement(value, 0.02 * value),
                    "hidden_mse": Measurement(3 * value, 0.06 * value),
                    "long_context": Measurement(10 * value, 0.0),
                }
    return Scores(library.parent_fingerprint, 128, 128 * 32768, entries)


def make_search(seed: int, one_option: bool) -> SearchProgram:
    """Return the program; with `one_option` each scenario has only the deployment and batch size of a first search."""
    library = make_library()
    quality_losses = Objective().quality_losses(library, make_scores(library, seed))
    models = [CostModel(ModelShape.from_config(CONFIG), target.scenario, Roofline()) for target in TARGETS]
    space = SearchSpace(batch_sizes=BATCH_SIZES)
    program = build_program(library.layers, quality_losses, models, Constraints(TARGETS), space)
    if not one_option:
        return program
    (best,) = mip.solve(program.problem)
    choices = tuple((options[index],) for options, index in zip(program.problem.choices, best.options))
    return replace(program, problem=replace(program.problem, choices=choices))


def proven_solve(program: SearchProgram) -> tuple[float, float]:
    """Return the wall-clock and CPU seconds of one solve."""
    wall, cpu = time.perf_counter(), time.process_time()
    (solution,) = mip.solve(program.problem)
    if not solution.proven or solution.gap != 0:
        raise SystemExit(f"not proven: {solution}")
    return time.perf_counter() - wall, time.process_time() - cpu


def seconds_to_first_line(recipe: Path) -> tuple[float, float]:
    """Return the wall-clock and CPU seconds of a process from its start to the solver's first line."""
    command = [sys.executable, "-m", "lit_puzzle", "run", str(recipe), "--overwrite"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        first = next((line for line in run.stdout if line.startswith("solver")), None)
        seconds = time.perf_counter() - start
        run.kill()
        usage = os.wait4(run.pid, 0)[2]
        run.returncode = 0
    if first is None:
        raise SystemExit("`lightning run` failed")
    return seconds, usage.ru_utime + usage.ru_stime


def imports_torch(recipe: Path) -> bool:
    """Return whether a whole run imports torch."""
    code = "import sys; from lit_puzzle.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "run", str(recipe), "--overwrite"]
    return subprocess.check_output(command, text=True).split()[-1] != "False"


def search(folder: Path, *words: str) -> dict[str, Any]:
    """Run the recipe of 120B on the library and scores of a folder; return plan.json."""
    command = [
        sys.executable,
        "-m",
        "lit_puzzle",
        "run",
        str(RECIPE_120B),
        "--overwrite",
        "--objective.metric=kl",
        *words,
    ]
    command += [f"--{name}={folder / name}" for name in ("library", "scores")]
    subprocess.run([*command, f"--run_dir={folder / 'recipe'}"], check=True, stdout=subprocess.DEVNULL)
    record: dict[str, Any] = json.loads((folder / "recipe" / "plan.json").read_text())
    return record


def run_recipe(folder: Path) -> dict[str, float | bool]:
    """Run the whole recipe; return its seconds and what was found and proven."""
    start = time.perf_counter()
    record = search(folder)
    seconds = time.perf_counter() - start
    return {
        "recipe_seconds": seconds,
        "recipe_solver_seconds": record["optimality"]["seconds"],
        "recipe_proven": record["optimality"]["proven"],
        "recipe_alternatives": len(record["alternatives"]),
        "recipe_alternatives_proven": sum(other["proven"] for other in record["alternatives"]),
        "recipe_sweep_proven": sum(point["proven"] for point in record["sweep"]),
        "recipe_sweep_points": len(record["sweep"]),
    }


def save(folder: Path, seed: int) -> None:
    """Write a library and its scores."""
    for part in ("library", "scores"):
        (folder / part).mkdir()
    library = make_library(seed=seed)
    library.save(folder / "library")
    make_scores(library, seed).save(folder / "scores")


def plans(count: int) -> None:
    """Print the plan of each library and allocator: layers of each window, experts kept, speed-ups, quality loss."""
    for seed in range(count):
        with tempfile.TemporaryDirectory() as name:
            save(Path(name), seed)
            for allocator in ("vllm", "vllm_weighted", "ideal"):
                words = (
                    "--constraints.sweep=null",
                    "--solver.num_solutions=1",
                    f"--costs.engine.kv.allocator={allocator}",
                    "--costs.engine.kv.context_tokens=131072",
                )
                record = search(Path(name), *words)
                blocks = record["plan"]["blocks"]
                windows = Counter(block["window_tokens"] for block in blocks)
                row = {
                    "seed": seed,
                    "allocator": allocator,
                    "full": windows[None],
                    "window_8192": windows[WINDOW],
                    "window_128": windows[128],
                    "experts": sum(len(block["experts"]) for block in blocks),
                    "speedups": [round(target["speedup"], 3) for target in record["predicted"]],
                    "quality_loss": round(record["quality_loss"], 4),
                    "gap": record["optimality"]["gap"],
                }
                print(json.dumps(row), flush=True)


def main(runs: int) -> None:
    results: dict[str, float | bool] = {}
    for name, one_option in (("solve", True), ("product", False)):
        pairs = [proven_solve(make_search(seed, one_option)) for seed in range(runs)]
        results |= medians(name, pairs) | {f"{name}_slowest_seconds": max(wall for wall, _ in pairs)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder, seed=0)
        recipe = folder / "search.yaml"
        recipe.write_text(RECIPE.format(folder=folder))
        results |= medians("startup", [seconds_to_first_line(recipe) for _ in range(runs)])
        results["imports_torch"] = imports_torch(recipe)
        if importlib.util.find_spec("aiconfigurator_core") is not None:
            results |= run_recipe(folder)
    for key, value in results.items():
        print(f"{key:24} {value if isinstance(value, bool) else round(value, 3)}")
    print(json.dumps(results))


def medians(name: str, pairs: list[tuple[float, float]]) -> dict[str, float | bool]:
    """Return the medians of wall-clock and CPU seconds."""
    walls, cpus = zip(*pairs)
    return {f"{name}_seconds": statistics.median(walls), f"{name}_cpu_seconds": statistics.median(cpus)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--plans", type=int, metavar="N", help="plans under both allocators of N libraries")
    arguments = parser.parse_args()
    main(arguments.runs) if arguments.plans is None else plans(arguments.plans)
