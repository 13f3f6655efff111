"""GRPO, off-policy and on-policy distillation of the embedded child at equal CPU seconds, and parts that train alone.

    python scripts/ablations/tiny_recovery.py [--seeds 0 1 2] [--rows ROW ...] [--folder runs/ablation_recovery]

Every row starts from `lit_puzzle/assets/tiny_child` and trains for about `BUDGET` CPU seconds (two rows: twice that),
startup left out: the steps below, which short runs of other seeds had given, fixed before any row was run. Schedules
end with the budget; nothing is validated, the last weights count. Documents of off-policy distillation are generated
once, and not counted. Then the child is measured on held-out problems, the same ones for every row, for the parent and
for the child before. A finished run is not run again; each is a process, forked with the libraries already imported, so
that the CPU seconds in its run.json are its own. Ends with a table: means over seeds, ± their standard error;
differences are paired by problem.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import trl.trainer.grpo_trainer  # noqa: F401  (imported once, for every fork)

import lit_puzzle.distill.global_kd
import lit_puzzle.distill.on_policy
import lit_puzzle.evaluate.accuracy
import lit_puzzle.rl.trl_engine  # noqa: F401
from lit_puzzle.cli import main as lit_puzzle_main
from lit_puzzle.environments.environment import EFFORTS
from lit_puzzle.environments.episodes import Episode, shares_without
from lit_puzzle.evaluate.accuracy import read_episodes
from lit_puzzle.evaluate.summary import compare, summarize
from lit_puzzle.run.folder import PACKAGE, is_complete

BUDGET = 30  # CPU seconds of training
PROBLEMS = 256  # per effort
PARENT, CHILD = PACKAGE / "assets" / "tiny_parent", PACKAGE / "assets" / "tiny_child"
PART = "--model.init_args.training.trainable="
LOSS = "--model.init_args.loss."
STEPS = {"rl_recover": 16, "distill": 75, "on_policy": 15}
# name -> (recipe, overrides)
ROWS: dict[str, tuple[str, list[str]]] = {
    "GRPO": ("rl_recover", []),
    "off-policy": ("distill", []),
    "on-policy": ("on_policy", []),
    "on-policy, reverse KL": ("on_policy", [f"{LOSS}divergence=reverse_kl"]),
    "on-policy, forward KL": ("on_policy", [f"{LOSS}divergence=forward_kl"]),
    "on-policy, mix of .75": ("on_policy", [f"{LOSS}beta=0.75"]),
    "off-policy, twice as long": ("distill", [f"--trainer.max_steps={2 * STEPS['distill']}"]),
    "on-policy, twice as long": ("on_policy", [f"--trainer.max_steps={2 * STEPS['on_policy']}"]),
    **{
        f"{name}, {part.replace('_', ' ')} alone": (recipe, [f"{PART}{part}"])
        for name, recipe in (("off-policy", "distill"), ("on-policy", "on_policy"))
        for part in ("router", "attention", "attention_and_router")
    },
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation_recovery"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.folder
    if any(ROWS[name][0] == "distill" for name in arguments.rows):
        stage("generate", folder / "generate", [])
    parent, before = (evaluated(folder / name, place) for name, place in (("parent", PARENT), ("before", CHILD)))
    found: dict[str, list[tuple[list[Episode], float]]] = {name: [] for name in arguments.rows}
    for seed in arguments.seeds:  # a seed of every row before the next seed
        for name in arguments.rows:
            found[name].append(recovered(folder, name, seed))
    print("| | seeds | accuracy | to before (paired) | to the parent (paired) | tokens | loops, cut off, % | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    print_row("parent", [parent], [], before, parent)
    print_row("before", [before], [], before, parent)
    for name, runs in found.items():
        print_row(name, [episodes for episodes, _ in runs], [seconds for _, seconds in runs], before, parent)


def recovered(folder: Path, name: str, seed: int) -> tuple[list[Episode], float]:
    """Return the episodes of a row's child, and the CPU seconds of its run."""
    recipe, changes = ROWS[name]
    place = folder / f"{name.replace(', ', '-').replace(' ', '_')}" / f"seed{seed}"
    words = [f"--seed_everything={seed}", f"--trainer.max_steps={STEPS[recipe]}", "--trainer.limit_val_batches=0"]
    words += [f"--model.init_args.child={CHILD}", *changes]
    words += ["--model.init_args.evaluation.prompts_per_effort=2"]  # measured below
    if recipe == "distill":
        words += [f"--data.init_args.documents={folder}/generate/documents"]
    record = stage(recipe, place / "run", words)
    return evaluated(place / "evaluate", place / "run" / "child"), float(record["cpu_seconds"])


def evaluated(place: Path, checkpoint: Path) -> list[Episode]:
    """Return the episodes of a checkpoint."""
    words = [f"--checkpoint={checkpoint}", "--held_out.seed=1", f"--held_out.prompts_per_effort={PROBLEMS}"]
    stage("evaluate", place, words)
    return read_episodes(place)


def print_row(
    name: str,
    rows: Sequence[list[Episode]],
    seconds: Sequence[float],
    before: list[Episode],
    parent: list[Episode],
) -> None:
    """Print means over seeds, ± their standard error where there are several."""
    summaries = [summarize(episodes) for episodes in rows]
    gains = [[compare(reference, episodes) for episodes in rows] for reference in (before, parent)]
    cells = [across([[each[f"accuracy/{effort}"] for each in summaries] for effort in EFFORTS], ".3f")]
    for reference in gains:
        cells.append(across([[each[f"accuracy_gain/{effort}"] for each in reference] for effort in EFFORTS], "+.3f"))
    cells.append(across([[each[f"tokens/{effort}"] for each in summaries] for effort in EFFORTS], ".1f"))
    cells.append(" / ".join(ending(rows, effort) for effort in EFFORTS))
    spent = f"{statistics.mean(seconds):.0f}" if seconds else ""
    print(f"| {name} | {len(rows)} | {' | '.join(cells)} | {spent} |")


def across(values: list[list[float]], form: str) -> str:
    """Return the mean over seeds of each effort, ± its standard error."""
    shown = []
    for seeds in values:
        error = f" ± {statistics.stdev(seeds) / len(seeds) ** 0.5:{form.lstrip('+')}}" if len(seeds) > 1 else ""
        shown.append(f"{statistics.mean(seeds):{form}}{error}")
    return " / ".join(shown)


def ending(rows: Sequence[list[Episode]], effort: str) -> str:
    """Return the percentages of completions that loop and that were cut off."""
    episodes = [episode for row in rows for episode in row if episode.effort == effort]
    cut = sum(not episode.finished for episode in episodes) / len(episodes)
    return f"{100 * shares_without(episodes).get('looping', 0.0):.1f}, {100 * cut:.1f}"


def stage(recipe: str, folder: Path, words: list[str]) -> dict[str, Any]:
    """Run a recipe unless its folder is complete; return run.json."""
    if not is_complete(folder):
        words = ["run", f"recipes/{recipe}.yaml", f"--run_dir={folder}", *words]
        process = get_context("fork").Process(target=lit_puzzle_main, args=(words,))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{' '.join(words)} ended with exit code {process.exitcode}")
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return record


if __name__ == "__main__":
    main()
