"""Ablation of the search on the tiny model: solvers, expert scores, window scores; children before distillation.

    python scripts/ablations/tiny_search.py [--seeds 0 1 2] [--folder runs/ablation_search]

For every seed (of the calibration problems and of the evaluation's sampling): importance, block library, scores; then
for every variant below the search of `recipes/search.yaml` under the same budget, the assembled child, and its accuracy
on the same held-out problems. Resumable: finished stages are not run again. Prints a table per budget and a JSON line.
For ablations of your own take `recipes/ablations.yaml`, which has the solvers and the window score as a pipeline.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from lit_puzzle.cli import run
from lit_puzzle.library.library import Library
from lit_puzzle.run.folder import is_complete
from lit_puzzle.scoring.scores import Scores
from lit_puzzle.spec import Plan

METHODS = {"leave_one_out": "LeaveOneOut", "reap": "Reap", "frequency": "Frequency", "random": "Random"}
EFFORTS = ("low", "medium", "high")
EXPERTS_ONLY = "--objective.window_metric=null"
# name -> (expert scores, overrides of recipes/search.yaml)
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "search (MIP)": ("leave_one_out", []),
    "greedy": ("leave_one_out", ["--solver.name=greedy"]),
    "uniform": ("leave_one_out", ["--solver.name=uniform"]),
    "random, draw 1": ("leave_one_out", ["--solver.name=random", "--solver.seed=1"]),
    "random, draw 2": ("leave_one_out", ["--solver.name=random", "--solver.seed=2"]),
    "random, draw 3": ("leave_one_out", ["--solver.name=random", "--solver.seed=3"]),
    "max parameters": ("leave_one_out", ["--solver.name=max_parameters"]),
    "experts by REAP": ("reap", []),
    "experts by frequency": ("frequency", []),
    "experts at random": ("random", []),
    "windows by kl": ("leave_one_out", [EXPERTS_ONLY]),
    "windows and experts by hidden_mse": ("leave_one_out", [EXPERTS_ONLY, "--objective.metric=hidden_mse"]),
    "windows and experts by mean_rank": ("leave_one_out", [EXPERTS_ONLY, "--objective.metric=mean_rank"]),
    "windows by long context, experts by hidden_mse": ("leave_one_out", ["--objective.metric=hidden_mse"]),
    "balance 0.1": ("leave_one_out", ["--objective.balance=0.1"]),
    "balance 0.3": ("leave_one_out", ["--objective.balance=0.3"]),
    "balance 0.7": ("leave_one_out", ["--objective.balance=0.7"]),
    "balance 0.9": ("leave_one_out", ["--objective.balance=0.9"]),
}
SCENARIO = "gpu: cpu, num_gpus: 1, prompt_tokens: 96, generated_tokens: 48, kv_dtype: bfloat16, expert_dtype: bfloat16"
MEMORY = f"[{{scenario: {{{SCENARIO}, batch_size: 32}}, budget: {{memory_gib: 0.0042}}}}]"
BUDGETS = {
    "1.25M parameters, 1.06x": ["--constraints.limits.total_parameters=1250000"],
    "1.5M parameters, 1.06x": [],
    "60% of the parent's memory with 32 requests": [
        "--constraints.limits.total_parameters=null",
        f"--constraints.targets={MEMORY}",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation_search"))
    arguments = parser.parse_args()
    found = {seed: variants(arguments.folder / f"seed{seed}", seed) for seed in arguments.seeds}
    for budget in BUDGETS:
        print(f"\n{budget}\n| variant | {' | '.join(EFFORTS)} | mean | of each seed | plan of the first |")
        for name in VARIANTS:
            rows = [found[seed][budget][name] for seed in arguments.seeds]
            cells = [f"{statistics.mean(row[effort] for row in rows):.3f}" for effort in (*EFFORTS, "mean")]
            by_seed = " ".join(f"{row['mean']:.3f}" for row in rows)
            print(f"| {name} | {' | '.join(cells)} | {by_seed} | {rows[0]['plan']} |")
    print(json.dumps(found))


def variants(folder: Path, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    for method in METHODS:
        prepare(folder, seed, method)
    results: dict[str, dict[str, dict[str, Any]]] = {budget: {} for budget in BUDGETS}
    evaluated: dict[Plan, dict[str, Any]] = {}
    for index, (budget, limits) in enumerate(BUDGETS.items()):
        for number, (name, (method, changes)) in enumerate(VARIANTS.items()):
            place = folder / f"budget{index}_variant{number}"
            sources = [
                f"--library={folder}/library_{method}",
                f"--scores={folder}/scores_{method}.json",
                "--constraints.sweep=null",
            ]
            stage("search", place / "search", [*sources, *limits, *changes])
            plan = Plan.load(place / "search" / "plan.json")
            if plan not in evaluated:
                evaluated[plan] = evaluate_child(place, plan)
            results[budget][name] = evaluated[plan]
    return results


def prepare(folder: Path, seed: int, method: str) -> None:
    """Make the importance of one method, its library, and the scores of that library."""
    importance, library, scores = (folder / f"{what}_{method}" for what in ("importance", "library", "score"))
    changes = [
        f"--model.init_args.method=lit_puzzle.importance.expert_scores.{METHODS[method]}",
        f"--data.init_args.prompts.seed={seed}",
    ]
    if method == "random":
        changes.append(f"--model.init_args.method.init_args.seed={seed}")
    stage("importance", importance, changes)
    stage("library", library, [f"--importance={importance}"])
    first = folder / "score_leave_one_out"
    changes = [f"--library={library}", f"--seed={seed}"]
    if scores != first:  # windows do not depend on the method: their scores are taken from the first
        changes += ["--evaluations=null", f"--data.init_args.sequences={first}/calibration.jsonl"]
    stage("score", scores, changes)
    own, windows = Scores.load(scores), Scores.load(first)
    entries = {
        key: windows.entries[key] if key[1].startswith("window=") else metrics for key, metrics in own.entries.items()
    }
    file = folder / f"scores_{method}.json"
    merged = Scores(own.parent_fingerprint, own.samples, own.tokens, entries)
    file.write_text(json.dumps(merged.to_json()))
    assert Library.load(library).parent_fingerprint == merged.parent_fingerprint


def stage(recipe: str, run_dir: Path, changes: list[str]) -> None:
    if not is_complete(run_dir):
        run(f"recipes/{recipe}.yaml", [f"--run_dir={run_dir}", *changes])


def evaluate_child(place: Path, plan: Plan) -> dict[str, Any]:
    """Return the accuracy of the assembled child and its plan in short: experts per layer, w where a window was set."""
    stage("assemble", place / "assemble", [f"--plan={place}/search/plan.json"])
    stage("evaluate", place / "evaluate", [f"--checkpoint={place}/assemble/child"])
    results = json.loads((place / "evaluate" / "run.json").read_text())["results"]
    accuracy = {effort: results[f"accuracy/{effort}"] for effort in EFFORTS}
    short = " ".join(
        f"{block.num_experts}" + (f"w{block.window_tokens}" if layer % 2 and block.window_tokens else "")
        for layer, block in enumerate(plan.blocks)
    )
    return accuracy | {"mean": statistics.mean(accuracy.values()), "plan": short}


if __name__ == "__main__":
    main()
