"""Does the sum of replace-1-block scores predict the child? Random plans of one size against what they measure.

    python scripts/ablations/plan_scores.py [--plans 60] [--distilled 24] [--part 0/1] [--lengths]
        [--distill_seed 0] [--folder runs/plan_scores]

Plans keep 64 of the tiny parent's 96 experts, drawn among the library's counts, and replace the full attention of two
of its three full layers, by a window of 16 or 48 tokens: all have the same number of parameters. The plan of the search
under the same bounds, for each objective, is measured beside them. For every plan: KL to the parent on documents that
were held out, and accuracy, mean of three efforts with 128 problems each; for the first `--distilled` plans also after
25 updates of distillation. Printed are Spearman's rank correlations of every summed score with them (accuracy: with its
negative), with 95 % intervals of the bootstrap over plans, and how many random plans are better than the search's.

With `--lengths` the searches are left out, and the question is whether the changes of answer lengths add up: the ratio
of child's to parent's mean tokens at each effort, and over all (`mix`), against 1 + the sum of the changes d of its
blocks (each relative to the parent), and against the product of 1 + d.

`--distill_seed 1` distills the same plans, without those of the searches, with another seed; `--plans 20` are the first
20 of 60.
`--part 1/2` measures every second plan, for a process beside this one; a run without it prints. Resumable.
"""

import argparse
import json
import os
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scipy.stats import bootstrap, spearmanr  # type: ignore[import-untyped]

from lit_puzzle.cli import run
from lit_puzzle.library.library import Library, parts
from lit_puzzle.run.folder import is_complete
from lit_puzzle.scoring.scores import Scores
from lit_puzzle.search.objective import Objective
from lit_puzzle.spec import Plan

EXPERTS, WINDOWED, STEPS = 64, 2, 25
OBJECTIVES = {
    **{metric: Objective(metric) for metric in ("kl", "hidden_mse", "mean_rank", "js", "top1_disagreement", "lm_loss")},
    "kl, windows by long context": Objective("kl", "long_context"),
    "hidden_mse, windows by long context": Objective("hidden_mse", "long_context"),
    "mean_rank, windows by long context": Objective("mean_rank", "long_context"),
}
MEASURES = ("KL before", "errors before", "KL after", "errors after")
EFFORTS = ("low", "medium", "high")
TARGET = (
    "[{scenario: {gpu: cpu, num_gpus: 1, prompt_tokens: 96, generated_tokens: 48, kv_dtype: bfloat16, expert_dtype: "
    "bfloat16}, budget: {}}]"
)


def stage(recipe: str, run_dir: Path, *words: str) -> dict[str, float]:
    """Run a recipe unless it has run; return its results."""
    if not is_complete(run_dir):
        run(f"recipes/{recipe}.yaml", [f"--run_dir={run_dir}", *words])
    results: dict[str, float] = json.loads((run_dir / "run.json").read_text())["results"]
    return results


def documents(folder: Path, seed: int) -> Path:
    """Make the documents to distill from and to measure on; return their folder."""
    stage("generate", folder / "generate", "--prompts.num_prompts=3072", f"--prompts.seed={seed}")
    return folder / "generate" / "documents"


def prepare(folder: Path, seed: int, recipe: str = "importance", evaluate: str = "all") -> tuple[Library, Scores]:
    """Make importance, by its recipe, library and scores; problems are put to all blocks, or to windows alone."""
    stage(recipe, folder / "importance", f"--data.init_args.prompts.seed={seed}")
    stage("library", folder / "library", f"--importance={folder}/importance")
    words = (f"--library={folder}/library", f"--seed={seed}", f"--scoring.evaluate={evaluate}")
    stage("score", folder / "score", *words)
    return Library.load(folder / "library"), Scores.load(folder / "score")


def random_plan(library: Library, generator: random.Random) -> tuple[str, ...]:
    """Return the names of a plan's candidates; every plan of this size is as likely as any other."""
    while True:
        row = [generator.choice(candidates) for candidates in library.layers]
        changed = [
            one.block.window_tokens != candidates[0].block.window_tokens
            for one, candidates in zip(row, library.layers, strict=True)
        ]
        if sum(one.block.num_experts for one in row) == EXPERTS and sum(changed) == WINDOWED:
            return tuple(one.name for one in row)


def searched_plans(folder: Path) -> dict[str, Plan]:
    """Return the plan of the search for each objective, under the bounds that the random plans meet."""
    plans = {}
    for place, (name, objective) in enumerate(OBJECTIVES.items()):
        run_dir = folder / f"search{place}"
        words = [f"--library={folder}/library", f"--scores={folder}/score", f"--constraints.targets={TARGET}"]
        words += ["--constraints.sweep=null", "--constraints.limits.total_parameters=1450000"]
        words += ["--constraints.limits.full_attention_layers=1", f"--objective.metric={objective.metric}"]
        stage("search", run_dir, *words, f"--objective.window_metric={objective.window_metric or 'null'}")
        plans[name] = Plan.load(run_dir / "plan.json")
    return plans


def measure(
    folder: Path, plan: Plan, documents: Path, distilled: bool, seed: int, updates: int = STEPS
) -> dict[str, float]:
    """Return KL and errors of a plan's child, and with `distilled` those after a short distillation with this seed."""
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "plan.json")
    stage("assemble", folder / "assemble", f"--plan={folder}/plan.json")
    found = {}
    children = {"before": folder / "assemble" / "child"}
    if distilled:
        words = [f"--model.init_args.child={children['before']}", f"--data.init_args.documents={documents}"]
        words += ["--trainer.val_check_interval=1000", "--trainer.limit_val_batches=0", "--trainer.callbacks=null"]
        words += ["--model.init_args.evaluation.prompts_per_effort=2"]
        words += [f"--trainer.max_steps={updates}", f"--seed_everything={seed}"]
        stage("distill", folder / "distill", *words)
        children["after"] = folder / "distill" / "child"
    for when, child in children.items():
        where = (f"--checkpoint={child}", f"--documents={documents}")
        found[f"KL {when}"] = stage("text_distance", folder / f"distance_{when}", *where)["kl"]
        problems = (f"--checkpoint={child}", "--held_out.prompts_per_effort=128", "--held_out.texts=false")
        evaluated = stage("evaluate", folder / f"evaluate_{when}", *problems)
        found[f"errors {when}"] = 1 - evaluated["accuracy"]
        for effort in EFFORTS:
            found |= {f"tokens/{effort} {when}": evaluated[f"tokens/{effort}"]}
            found |= {f"cut/{effort} {when}": 1 - evaluated[f"finished/{effort}"]}
    return found


def ratios(tokens: Mapping[str, float], parent: Mapping[str, float]) -> dict[str, float]:
    """Return tokens over the parent's at each effort, and over all of them."""
    mix = sum(tokens.values()) / sum(parent.values())
    return {effort: tokens[effort] / parent[effort] for effort in EFFORTS} | {"mix": mix}


def report_lengths(
    library: Library, scores: Scores, names: Sequence[tuple[str, ...]], rows: Sequence[dict[str, float]], folder: Path
) -> None:
    """Print how the lengths of the plans' answers follow from those with one block replaced."""
    problems = ("--checkpoint=lit_puzzle/assets/tiny_parent", "--held_out.prompts_per_effort=128")
    own = stage("evaluate", folder / "evaluate_parent", *problems, "--held_out.texts=false")
    parent = {effort: own[f"tokens/{effort}"] for effort in EFFORTS}
    known = {effort: scores.parent[f"long_context/tokens/{effort}"] for effort in EFFORTS}
    predicted = []
    for plan in names:
        halves = [(layer, half) for layer, name in enumerate(plan) for half in parts(library.candidate(layer, name))]
        found = [scores.entries[layer, half] for layer, half in halves if half is not None]
        gained = [{e: known[e] + one[f"long_context/tokens/{e}"].mean for e in EFFORTS} for one in found]
        each = [ratios(one, known) for one in gained]
        sums = {key: 1 + sum(one[key] - 1 for one in each) for key in (*EFFORTS, "mix")}
        products = {key: float(np.prod([one[key] for one in each])) for key in (*EFFORTS, "mix")}
        predicted.append({"sum": sums, "product": products})
    print("| effort | when | by | rank correlation | true ratio | predicted | mean absolute error | ratio 1: error |")
    print("|---|---|---|---|---|---|---|---|")
    for when in ("before", "after"):
        places = [place for place, row in enumerate(rows) if f"errors {when}" in row]
        true = [ratios({e: rows[place][f"tokens/{e} {when}"] for e in EFFORTS}, parent) for place in places]
        for key in (*EFFORTS, "mix") if len(places) > 2 else ():
            for by in ("sum", "product"):
                values, ours = [one[key] for one in true], [predicted[place][by][key] for place in places]
                errors = [abs(a - b) for a, b in zip(values, ours, strict=True)]
                numbers = [statistics.mean(x) for x in (values, ours, errors, [abs(value - 1) for value in values])]
                cells = " | ".join(f"{number:.3f}" for number in numbers)
                print(f"| {key} | {when} | {by} | {correlation(ours, values)} | {cells} |")
        for effort in EFFORTS if places else ():
            print(f"cut {when} at {effort}: {statistics.mean(rows[p][f'cut/{effort} {when}'] for p in places):.3f}")


def correlation(sums: Sequence[float], values: Sequence[float]) -> str:
    """Return Spearman's rank correlation with its interval."""

    def rank(one: np.ndarray, other: np.ndarray) -> float:
        return float(spearmanr(one, other).statistic)

    ends = bootstrap(
        (sums, values), rank, paired=True, vectorized=False, n_resamples=2000, method="percentile", rng=0
    ).confidence_interval
    return f"{rank(np.array(sums), np.array(values)):.2f} [{ends.low:.2f}, {ends.high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=60)
    parser.add_argument("--distilled", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distill_seed", type=int, help="the seed of all else, if not given")
    parser.add_argument("--part", default="0/1", help="which plans: N/OF")
    parser.add_argument("--lengths", action="store_true", help="whether changes of answer lengths add up")
    parser.add_argument("--folder", type=Path, default=Path("runs/plan_scores"))
    given = parser.parse_args()
    own, parts = map(int, given.part.split("/"))
    library, scores = prepare(given.folder, given.seed)
    generator, names = random.Random(given.seed), list[tuple[str, ...]]()
    while len(names) < given.plans:
        drawn = random_plan(library, generator)
        names += [drawn] if drawn not in names else []
    written = documents(given.folder, given.seed)
    seed = given.seed if given.distill_seed is None else given.distill_seed
    folder = given.folder if seed == given.seed else given.folder / f"distill_seed{seed}"
    rows = [
        measure(folder / f"plan{place:02}", library.plan(drawn), written, place < given.distilled, seed)
        for place, drawn in enumerate(names)
        if place % parts == own
    ]
    if given.lengths:
        if parts == 1:
            report_lengths(library, scores, names, rows, given.folder)
        return
    searched = searched_plans(given.folder) if folder == given.folder else {}
    best = {
        name: measure(folder / f"searched{place}", plan, written, given.distilled > 0, seed)
        for place, (name, plan) in enumerate(searched.items())
        if place % parts == own
    }
    if parts == 1:
        report(library, scores, names, rows, best)


def report(
    library: Library,
    scores: Scores,
    names: Sequence[tuple[str, ...]],
    rows: Sequence[dict[str, float]],
    best: dict[str, dict[str, float]],
) -> None:
    """Print the table and a JSON line."""
    print(f"| summed score | {' | '.join(MEASURES)} | random plans better than the searched one |\n|{'---|' * 6}")
    table = {}
    for name, objective in OBJECTIVES.items():
        grid = objective.quality_losses(library, scores)
        places = [{one.name: place for place, one in enumerate(candidates)} for candidates in library.layers]
        sums = [sum(grid[layer][places[layer][one]] for layer, one in enumerate(plan)) for plan in names]
        cells, better = [], []
        for measured in MEASURES:
            known = [place for place, row in enumerate(rows) if measured in row]
            values = [rows[place][measured] for place in known]
            cells.append(correlation([sums[place] for place in known], values) if len(known) > 2 else "")
            better.append(
                f"{sum(value < best[name][measured] for value in values)} of {len(values)}" if known and best else ""
            )
        table[name] = {"correlations": cells, "better": better, "searched": best.get(name)}
        print(f"| {name} | {' | '.join(cells)} | {', '.join(better)} |")
    for measured in MEASURES:
        values = [row[measured] for row in rows if measured in row]
        if values:
            print(f"{measured}: {min(values):.3f} to {max(values):.3f}, median {statistics.median(values):.3f}")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
