"""Which plan is best after recovery: objectives, scores and uniform plans, before and after a short distillation.

    python scripts/ablations/recovered_plans.py [--seeds 0 1 2] [--rows NAME ...] [--importance RECIPE ...]
        [--updates 25] [--windows] [--clipped] [--folder runs/recovered]

For every seed (of calibration, scores, problems that blocks are scored on, distillation): importance (leave-one-out),
library, scores; for every row below the plan of `recipes/search.yaml`, its child, and the child after `--updates` of
distillation, on documents that are the same for all. "1.15M parameters" has as many as "uniform experts" at most.
Printed: predicted speed-up and requests, KL to the parent on held-out documents, errors and tokens of an answer over
the parent's, 128 problems at each of three efforts; means over seeds and, in brackets, each seed's. The requests after
recovery are the predicted speed-up over the measured length ratio.

`--importance importance final_kl` makes every row by each of these recipes, and prints differences from the first with
their standard error (paired by seed). Recipes other than `importance` score lengths of windows alone and leave out the
row of requests. `--windows` and `--clipped` study leave-one-out.

`--windows` scores windows after recovery: the parent with one window, before and after 25 updates. Printed is how the
order of the six windows changes, and the plan of the search with these drops in place of the usual ones.

`--clipped` searches for requests with and without the gains of blocks that shorten answers. Resumable.
"""

import argparse
import json
import os
import statistics
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from plan_scores import EFFORTS, STEPS, documents, measure, prepare, stage  # type: ignore[import-not-found]
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from lit_puzzle.scoring.scores import Measurement, Scores
from lit_puzzle.spec import Plan

SCENARIO = "gpu: cpu, num_gpus: 1, prompt_tokens: 96, generated_tokens: 48, kv_dtype: bfloat16, expert_dtype: bfloat16"
REQUESTS = "--constraints.targets=[{{scenario: {{{}}}, budget: {{requests_over_parent: {}}}}}]"
ROWS: dict[str, list[str]] = {
    "throughput 1.06 (the recipe)": [],
    "requests 1.02": [REQUESTS.format(SCENARIO, 1.02)],
    "1.15M parameters": ["--constraints.limits.total_parameters=1150000"],
    "experts by hidden_mse": ["--objective.metric=hidden_mse"],
    "experts by mean_rank": ["--objective.metric=mean_rank"],
    "uniform experts, windows searched": ["--space.uniform_experts=true"],
    "uniform experts and windows": ["--solver.name=uniform"],
}


def searched(folder: Path, scores: Path, place: Path, *words: str) -> tuple[Plan, float]:
    """Return the plan of a search and its predicted speed-up."""
    sources = [f"--library={folder}/library", f"--scores={scores}", "--constraints.sweep=null"]
    found = stage("search", place, *sources, *words)
    return Plan.load(place / "plan.json"), found["speedup/0"]


def short(plan: Plan) -> str:
    """Return a plan in a few words: experts of each layer, w where a full layer has a window."""
    blocks = enumerate(plan.blocks)
    return " ".join(
        f"{b.num_experts}" + (f"w{b.window_tokens}" if layer % 2 and b.window_tokens else "") for layer, b in blocks
    )


def clip(folder: Path, seed: int) -> None:
    """Print the plans for requests where blocks that shorten answers count as such, and where as none that does."""
    (_, scores), file = prepare(folder, seed), folder / "scores_clipped.json"
    entries = {
        key: {name: Measurement(max(0.0, one.mean)) if "/tokens/" in name else one for name, one in metrics.items()}
        for key, metrics in scores.entries.items()
    }
    file.write_text(json.dumps(replace(scores, entries=entries).to_json()))
    for budget in (1.0, 1.02):
        for what, source in (("as measured", folder / "score"), ("clipped", file)):
            try:
                place = folder / f"search_{budget}_{what[:2]}"
                found = short(searched(folder, source, place, REQUESTS.format(SCENARIO, budget))[0])
            except SystemExit:
                found = "no plan"
            print(f"| {budget} | {what} | {found} |")


def one_row(
    folder: Path, name: str, written: Path, parent: dict[str, float], seed: int, updates: int
) -> dict[str, object]:
    """Return what the plan of a row measures."""
    place = folder / (f"row{list(ROWS).index(name)}" + (f"_{updates}" if updates != STEPS else ""))
    plan, speedup = searched(folder, folder / "score", place / "search", *ROWS[name])
    found: dict[str, object] = {"plan": short(plan), "speed-up": speedup}
    measured = measure(place, plan, written, True, seed, updates)
    own = sum(parent[f"tokens/{effort}"] for effort in EFFORTS)
    for when in ("before", "after"):
        found |= {f"{what} {when}": measured[f"{what} {when}"] for what in ("KL", "errors")}
        found[f"length {when}"] = length = sum(measured[f"tokens/{effort} {when}"] for effort in EFFORTS) / own
        found[f"requests {when}"] = speedup / length
    return found


def windows(folder: Path, seed: int, written: Path, parent: dict[str, float]) -> dict[str, object]:
    """Return the windows' drops and KL before and after recovery, and the plans of the search with either."""
    library, scores = prepare(folder, seed)
    names = [key for key in scores.entries if key[1].startswith("window=")]
    found: dict[str, dict[str, float]] = {}
    entries = dict(scores.entries)
    for layer, window in names:
        chosen = [window if place == layer else row[0].name for place, row in enumerate(library.layers)]
        found[f"{layer} {window}"] = measure(folder / f"{layer},{window}", library.plan(chosen), written, True, seed)
        drop = found[f"{layer} {window}"]["errors after"] - (1 - parent["accuracy"])
        entries[layer, window] = dict(entries[layer, window]) | {"long_context": Measurement(drop)}
    again = folder / "scores_recovered.json"
    again.write_text(json.dumps(replace(scores, entries=entries).to_json()))
    assert Scores.load(again).entries.keys() == scores.entries.keys()
    usual, _ = searched(folder, folder / "score", folder / "row0" / "search")
    plan, _ = searched(folder, again, folder / "search_recovered")
    drops = [scores.entries[key]["long_context"].mean for key in names]
    after = [row["errors after"] for row in found.values()]
    rank = float(spearmanr(drops, after).statistic)
    best = measure(folder / "row_recovered", plan, written, True, seed)
    result = {"rank correlation": rank, "plan": short(usual), "plan by recovered": short(plan)}
    return result | {"errors after": best["errors after"], "KL after": best["KL after"], "rows": found, "drops": drops}


def shown(values: list[float]) -> str:
    """Return the mean, and each seed's in brackets."""
    return f"{statistics.mean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def report(found: dict[str, list[dict[str, object]]], first: str) -> None:
    """Print rows ("recipe: name", one result per seed), and what they differ by from those of the first recipe."""
    for title, rows in found.items():
        name = title.split(": ", 1)[1]
        others = found.get(f"{first}: {name}", rows)
        print(f"| {title} | {'; '.join(str(row['plan']) for row in rows)} |")
        for key in rows[0].keys() - {"plan"}:
            values = [float(str(row[key])) for row in rows]
            gains = [one - float(str(row[key])) for one, row in zip(values, others, strict=True)]
            error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
            against = "" if others is rows else f"; {statistics.mean(gains):+.3f} ± {error:.3f}"
            print(f"    {key}: {shown(values)}{against}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--importance", nargs="+", default=["importance"])
    parser.add_argument("--updates", type=int, default=STEPS)
    parser.add_argument("--windows", action="store_true")
    parser.add_argument("--clipped", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/recovered"))
    given = parser.parse_args()
    written = documents(given.folder, 0)
    words = ("--checkpoint=lit_puzzle/assets/tiny_parent", "--held_out.prompts_per_effort=128")
    parent = stage("evaluate", given.folder / "parent", *words, "--held_out.texts=false")
    print(f"parent: errors {1 - parent['accuracy']:.3f}")
    found: dict[str, list[dict[str, object]]] = {}
    studied = []
    for seed in given.seeds:
        for recipe in given.importance:
            whole = recipe == "importance"
            folder = given.folder / (f"seed{seed}" if whole else f"seed{seed}_{recipe}")
            prepare(folder, seed, recipe, "all" if whole else "windows")
            for name in [name for name in given.rows if whole or "requests" not in name]:
                row = one_row(folder, name, written, parent, seed, given.updates)
                found.setdefault(f"{recipe}: {name}", []).append(row)
        folder = given.folder / f"seed{seed}"
        if given.clipped:
            clip(folder, seed)
        studied += [windows(folder, seed, written, parent)] if given.windows else []
    report(found, given.importance[0])
    print(json.dumps({"rows": found, "windows": studied}))


if __name__ == "__main__":
    main()
