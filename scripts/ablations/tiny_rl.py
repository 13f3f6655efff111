"""Ablation of length control in RL recovery on the tiny child, and of the average of its variants.

    python scripts/ablations/tiny_rl.py [--seeds 0 1 2] [--variants budgets none ...] [--folder runs/ablation_rl]
    python scripts/ablations/tiny_rl.py --recovery [--seeds 0 1 2]
    python scripts/ablations/tiny_rl.py --averages [--seeds 0 1 2]

Runs `recipes/rl_recover.yaml` once for every variant and seed (everything random except the problems of the evaluation,
1,024 at each effort, which are the same for all). A finished run is not run again; each is a process, so that the CPU
seconds in its run.json are its own. With `--averages`, `recipes/rl_high.yaml` and the average with the variant
`budgets`, which is the recipe as it is, and the sweep of `recipes/average.yaml`. With `--recovery`,
`recipes/pipeline_recovery.yaml` with each seed in its RL recovery and its distillation. Ends with a table of means over
seeds; gains are paired, ± their standard error over problems.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from lit_puzzle.environments.environment import EFFORTS
from lit_puzzle.environments.episodes import Episode
from lit_puzzle.evaluate.accuracy import read_episodes
from lit_puzzle.evaluate.standard_errors import mean_and_error
from lit_puzzle.run.folder import PACKAGE, is_complete

REWARDS, LOSS = "--model.init_args.rewards.", "--model.init_args.grpo.loss."
OFF = [f"{REWARDS}budget.weight=0"]
VARIANTS = {  # name -> overrides of recipes/rl_recover.yaml
    "budgets": [],
    "none": OFF,
    "ramp": [*OFF, f"{REWARDS}length=0.5", f"{REWARDS}length_start=1.5", f"{REWARDS}length_end=3"],
    "group": [*OFF, f"{REWARDS}group_length.weight=0.5"],
    "normalized": [f"{LOSS}aggregation=normalize_then_sum"],
    "thinking": [f"{REWARDS}endings.no_analysis=0.3"],
}
PROBLEMS = 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--averages", action="store_true")
    parser.add_argument("--recovery", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation_rl"))
    arguments = parser.parse_args()
    if arguments.averages:
        averages(arguments.folder, arguments.seeds)
        return
    if arguments.recovery:
        recovery(arguments.folder / "recovery", arguments.seeds)
        return
    print_head()
    for name in arguments.variants:
        found = [recovered(arguments.folder, name, seed, "rl_recover", VARIANTS[name]) for seed in arguments.seeds]
        if name == arguments.variants[0]:
            print_row("before", [{key: run[f"{key}/before"] for key in keys()} for run in found], found)
        after = [{key: run[f"{key}/after"] for key in keys()} for run in found]
        places = [arguments.folder / name / f"seed{seed}" for seed in arguments.seeds]
        pairs = [(read_episodes(place / "before"), read_episodes(place / "after")) for place in places]
        print_row(name, after, found, gains(pairs))


def recovered(folder: Path, name: str, seed: int, recipe: str, changes: list[str]) -> dict[str, float]:
    """Return the results of a recovery, which is run unless it is complete."""
    words = [f"--seed_everything={seed}", f"--model.init_args.evaluation.prompts_per_effort={PROBLEMS}", *changes]
    results: dict[str, float] = stage(recipe, folder / name / f"seed{seed}", words)["results"]
    return results


def gains(pairs: list[tuple[list[Episode], list[Episode]]]) -> str:
    """Return the paired gain of each effort: the mean over problems and seeds, ± its standard error over problems."""
    shown = []
    for effort in EFFORTS:
        rows = [
            (after.correct - before.correct, (after.environment, after.problem))
            for befores, afters in pairs
            for before, after in zip(befores, afters, strict=True)
            if after.effort == effort
        ]
        mean, error = mean_and_error([value for value, _ in rows], [problem for _, problem in rows])
        shown.append(f"{mean:+.3f} ± {error:.3f}")
    return " / ".join(shown)


def averages(folder: Path, seeds: list[int]) -> None:
    """Average the recoveries of every seed, and print the table of shares."""
    evaluation = ["--sweep.held_out.seed=1", f"--sweep.held_out.prompts_per_effort={PROBLEMS}"]
    places = []
    names = {"0": "balanced", "1": "high"}
    for seed in seeds:
        recovered(folder, "high", seed, "rl_high", [])
        recovered(folder, "budgets", seed, "rl_recover", [])
        words = [f"--first={folder}/high/seed{seed}/child", f"--second={folder}/budgets/seed{seed}/child"]
        places.append(folder / "average" / f"seed{seed}")
        stage("average", places[-1], [*words, *evaluation])
    parent = stage(
        "evaluate",
        folder / "parent",
        [f"--checkpoint={PACKAGE / 'assets' / 'tiny_parent'}", *(word.replace("sweep.", "") for word in evaluation)],
    )["results"]
    child = stage(
        "evaluate",
        folder / "child",
        [f"--checkpoint={PACKAGE / 'assets' / 'tiny_child'}", *(word.replace("sweep.", "") for word in evaluation)],
    )["results"]
    print_head()
    print_row("before RL", [child], [])
    print_shares(folder / "child", places, names)
    print_row("parent", [parent], [])


def recovery(folder: Path, seeds: list[int]) -> None:
    """Run the pipeline with every seed, and print the table of its average."""
    for seed in seeds:
        words = [f"--overrides.{name}.seed_everything={seed}" for name in ("rl_recover", "distill")]
        stage("pipeline_recovery", folder / f"seed{seed}", words)
    before = folder / f"seed{seeds[0]}" / "evaluate_before"
    print_head()
    print_row("before", [json.loads((before / "run.json").read_text())["results"]], [])
    places = [folder / f"seed{seed}" / "average" for seed in seeds]
    print_shares(before, places, {"0": "distillation alone", "1": "RL alone"})


def print_shares(before: Path, places: list[Path], names: dict[str, str]) -> None:
    """Print a row for every share of the sweeps in the averages of all seeds; gains are from an evaluation before."""
    found = [json.loads((place / "run.json").read_text())["results"] for place in places]
    for share in sorted({key.split("/")[0] for run in found for key in run if "/accuracy/" in key}, key=float):
        rows = [{key: run[f"{share}/{key}"] for key in keys()} for run in found]
        pairs = [(read_episodes(before), read_episodes(place / "sweep" / share)) for place in places]
        print_row(names.get(share, f"average, {share} of the first"), rows, [], gains(pairs))


def keys() -> list[str]:
    return [f"{what}/{effort}" for what in ("accuracy", "tokens") for effort in EFFORTS]


def print_head() -> None:
    print("| | accuracy low / medium / high | gain | tokens low / medium / high | high / low | CPU s | each seed |")
    print("|---|---|---|---|---|---|---|")


def print_row(name: str, rows: list[dict[str, float]], runs: list[dict[str, float]], gain: str = "") -> None:
    """Print means over seeds, ± their standard error where they differ, and accuracy and tokens of each seed."""
    accuracy, tokens = (
        " / ".join(across([row[f"{what}/{effort}"] for row in rows], form) for effort in EFFORTS)
        for what, form in (("accuracy", ".3f"), ("tokens", ".2f"))
    )
    shown = [[f"{row[f'accuracy/{effort}']:.3f} ({row[f'tokens/{effort}']:.2f})" for effort in EFFORTS] for row in rows]
    each = "; ".join(" ".join(numbers) for numbers in shown)
    seconds = f"{statistics.mean(run['cpu_seconds'] for run in runs):.0f}" if runs and name != "before" else ""
    ratio = across([row["tokens/high"] / row["tokens/low"] for row in rows], ".2f")
    print(f"| {name} | {accuracy} | {gain} | {tokens} | {ratio} | {seconds} | {each} |")


def across(values: list[float], form: str) -> str:
    """Return the mean over seeds, ± its standard error where seeds differ."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:{form}}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):{form}}{error}"


def stage(recipe: str, folder: Path, words: list[str]) -> dict[str, Any]:
    """Run a recipe unless its folder is complete; return run.json, the CPU seconds among its results."""
    if not is_complete(folder):
        command = [sys.executable, "-m", "lit_puzzle", "run", f"recipes/{recipe}.yaml", f"--run_dir={folder}", *words]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=sys.stderr)
    record = json.loads((folder / "run.json").read_text())
    record["results"]["cpu_seconds"] = record["cpu_seconds"]
    return record


if __name__ == "__main__":
    main()
