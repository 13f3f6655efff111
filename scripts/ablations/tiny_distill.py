"""Ablation of the distillations on the tiny model: blockwise distillation, losses, budget, data; a searched child each.

    python scripts/ablations/tiny_distill.py [--seeds 0 1 2] [--folder runs/ablation_distill]

For every seed (of everything random but the problems of the measurement, which are the same for all): importance,
library, scores, the plan of `recipes/search.yaml`, its child; the same library after blockwise distillation, the damage
of its blocks, and the child of the same plan with trained blocks; documents that the parent writes, and as many worked
solutions that it never wrote; then `recipes/distill.yaml` once for every variant below. A finished step is not run
again; each is a process of its own, so that the CPU seconds in its `run.json` are its own. Ends with tables of means
over seeds and a JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lit_puzzle.data.document_files import Document, write_documents
from lit_puzzle.environments.environment import EFFORTS, draw, render_prompt
from lit_puzzle.run.folder import PACKAGE, is_complete
from lit_puzzle.scoring.scores import Scores
from lit_puzzle.tiny.world import Chains, Counting, Sorting

PARENT = PACKAGE / "assets" / "tiny_parent"
FULL_STEPS = 480
HALF = 1 / 2
LOSS = "--model.init_args.loss."
# name -> (child, share of the budget, documents, overrides of recipes/distill.yaml)
VARIANTS: dict[str, tuple[str, float, str, list[str]]] = {
    "1/8 of the steps": ("child", 1 / 8, "generate", []),
    "1/4 of the steps": ("child", 1 / 4, "generate", []),
    "1/2 of the steps": ("child", HALF, "generate", []),
    "all steps": ("child", 1, "generate", []),
    "BLD, 1/8 of the steps": ("child_bld", 1 / 8, "generate", []),
    "BLD, 1/2 of the steps": ("child_bld", HALF, "generate", []),
    "BLD, all steps": ("child_bld", 1, "generate", []),
    "reverse KL": ("child", HALF, "generate", [f"{LOSS}divergence=reverse_kl"]),
    "JSD": ("child", HALF, "generate", [f"{LOSS}divergence=jsd"]),
    "without hidden states": ("child", HALF, "generate", [f"{LOSS}hidden=0"]),
    "hidden states alone": ("child", HALF, "generate", [f"{LOSS}logits=0"]),
    "with LM loss": ("child", HALF, "generate", [f"{LOSS}lm=1"]),
    "LM loss alone": ("child", HALF, "generate", [f"{LOSS}logits=0", f"{LOSS}hidden=0", f"{LOSS}lm=1"]),
    "worked solutions": ("child", HALF, "solutions", []),
    "YaRN factor 56": ("child_rope", HALF, "generate", []),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation_distill"))
    arguments = parser.parse_args()
    found = {seed: one_seed(arguments.folder / f"seed{seed}", seed) for seed in arguments.seeds}
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    columns = [*(f"accuracy/{effort}" for effort in EFFORTS), "tokens/high", "val_loss", "cpu_seconds"]
    print(f"\n| variant | {' | '.join(columns)} | high of each seed |")
    for name in names:
        rows = [found[seed][name] for seed in arguments.seeds]
        means = {column: statistics.mean(row[column] for row in rows) for column in columns if column in rows[0]}
        cells = [f"{means[column]:.3f}" if column in means else "" for column in columns]
        by_seed = ", ".join(f"{row['accuracy/high']:.3f}" for row in rows)
        print(f"| {name} | {' | '.join(cells)} | {by_seed} |")
    for seed in arguments.seeds:
        print(
            f"seed {seed}: summed KL of blocks, as cut and trained:", quality_losses(arguments.folder / f"seed{seed}")
        )
    print(json.dumps(found))


def one_seed(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Variant -> accuracy and tokens by effort, validation loss, CPU seconds."""
    prepare(folder, seed)
    results = {"parent": evaluated(folder / "evaluate_parent", PARENT)}
    for name, child in (("nothing", "child"), ("BLD alone", "child_bld")):
        place = folder / child / "child"
        results[name] = evaluated(folder / f"evaluate_{child}", place) | validated(folder, child, seed)
    for number, (name, (child, share, documents, changes)) in enumerate(VARIANTS.items()):
        steps = round(FULL_STEPS * share)
        place = folder / f"variant{number}"
        words = [f"--model.init_args.child={folder}/{child}/child", f"--seed_everything={seed}", *changes]
        words += [f"--data.init_args.documents={folder}/{documents}/documents", f"--trainer.max_steps={steps}"]
        record = stage("distill", place, [*words, f"--trainer.val_check_interval={steps // 4}"])
        run = record["results"]
        results[name] = {"val_loss": run["val_loss/best"], "cpu_seconds": record["cpu_seconds"]}
        results[name] |= {f"accuracy/{effort}": run[f"accuracy/{effort}/after"] for effort in EFFORTS}
        results[name] |= {f"tokens/{effort}": run[f"tokens/{effort}/after"] for effort in EFFORTS}
    return results


def prepare(folder: Path, seed: int) -> None:
    """Everything before global distillation."""
    stage("importance", folder / "importance", [f"--data.init_args.prompts.seed={seed}"])
    stage("library", folder / "library", [f"--importance={folder}/importance"])
    stage("score", folder / "score", [f"--library={folder}/library", f"--seed={seed}"])
    sources = [f"--library={folder}/library", f"--scores={folder}/score"]
    stage("search", folder / "search", [*sources, "--constraints.sweep=null"])
    plan = [f"--plan={folder}/search/plan.json"]
    stage("assemble", folder / "child", plan)
    stage("assemble", folder / "child_rope", [*plan, "--rope_factor=56"])
    stage("generate", folder / "generate", [f"--prompts.seed={seed}"])
    write_solutions(folder / "solutions" / "documents", seed, num_problems=9216)
    words = [f"--model.init_args.library={folder}/library", f"--data.init_args.documents={folder}/generate/documents"]
    stage("distill_blocks", folder / "distill_blocks", [*words, f"--seed_everything={seed}"])
    trained = f"--library={folder}/distill_blocks/library"
    sequences = f"--data.init_args.sequences={folder}/score/calibration.jsonl"
    apart = ["--evaluations=null", sequences, f"--seed={seed}"]
    stage("score", folder / "score_trained", [trained, *apart])
    stage("assemble", folder / "child_bld", [*plan, trained])


def write_solutions(folder: Path, seed: int, num_problems: int) -> None:
    """Worked solutions of the problems that `generate` would ask, as documents: synthetic data."""
    if (folder / "documents.json").is_file():
        return
    tokenizer = AutoTokenizer.from_pretrained(PARENT)
    families = {family.name: family for family in (Chains(), Sorting(), Counting())}
    documents = []
    for problem, effort in draw(
        list(families.values()), dict.fromkeys(EFFORTS, 1.0), num_problems, seed, held_out=False
    ):
        texts = render_prompt(tokenizer, problem, effort), families[problem.environment].trace(problem, effort)
        prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        mask = [0] * len(prompt) + [1] * len(answer)
        documents.append(Document([*prompt, *answer], mask, problem.environment, effort, 1.0))
    write_documents(folder, documents, PARENT)


def evaluated(place: Path, checkpoint: Path) -> dict[str, float]:
    """The checkpoint on the problems that `distill` measures."""
    results = stage("evaluate", place, [f"--checkpoint={checkpoint}", "--held_out.seed=1"])["results"]
    return {f"{what}/{effort}": results[f"{what}/{effort}"] for what in ("accuracy", "tokens") for effort in EFFORTS}


def validated(folder: Path, child: str, seed: int) -> dict[str, float]:
    """The loss of a child on the validation documents as it is: after one step at learning rate 0."""
    words = [f"--model.init_args.child={folder}/{child}/child", f"--seed_everything={seed}", "--trainer.max_steps=1"]
    words += [f"--data.init_args.documents={folder}/generate/documents", "--trainer.val_check_interval=1"]
    words += ["--model.init_args.optimizer.init_args.lr=0", "--model.init_args.accuracy=null"]
    return {"val_loss": stage("distill", folder / f"validate_{child}", words)["results"]["val_loss/best"]}


def quality_losses(folder: Path) -> list[float]:
    """Summed KL over the library's rows, before and after blockwise distillation."""
    return [
        sum(metrics["kl"].mean for metrics in Scores.load(folder / name).entries.values())
        for name in ("score", "score_trained")
    ]


def stage(recipe: str, run_dir: Path, changes: list[str]) -> dict[str, Any]:
    """Runs a recipe unless it is complete; its record."""
    if not is_complete(run_dir):
        words = [f"recipes/{recipe}.yaml", f"--run_dir={run_dir}", *changes]
        command = [sys.executable, "-m", "lit_puzzle", "run", *words]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    record: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return record


if __name__ == "__main__":
    main()
