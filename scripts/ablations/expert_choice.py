"""Ablation of the choice of experts: children of one size by several importance scores, before and after distillation.

    python scripts/ablations/expert_choice.py [--parent DIR] [--seeds 0 1 2] [--rankings NAME ...]
        [--distilled NAME ...] [--part 0/1] [--folder runs/expert_choice]

For every seed, of the 128 calibration prompts (the same for all scores) and of distillation: the importance scores,
their libraries (a quarter, a half, three quarters of the experts; no windows) and replace-1 KL; then for every score
two children with half of the parent's experts: `uniform`, half in every layer, and `searched`, the plan of least summed
KL with as many parameters. `best_of` has the sets of its scores side by side and takes, per layer and number, that of
the lower KL. Measured are KL to the parent on documents that were held out and accuracy, mean of three efforts with 128
problems each; for the `--distilled` scores also after 25 updates of distillation. Printed: the means over the seeds
with the standard error of the difference from leave-one-out (paired by seed), and a JSON line.

`--part 1/2` takes every second seed, for a process beside this one; a run without it prints. Resumable.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from lit_puzzle.cli import run
from lit_puzzle.model.layout import count_parameters
from lit_puzzle.run.files import read_json
from lit_puzzle.run.folder import is_complete
from lit_puzzle.spec import Plan

METHODS = {"leave_one_out": "LeaveOneOut", "reap": "Reap", "frequency": "Frequency"}
GEOMETRIC = ("leave_one_out", "final_kl")
BEST_OF = ("geometric_mean", "leave_one_out", "frequency")
RANKINGS = (*METHODS, "final_kl", "geometric_mean", "best_of")
STEPS, PLAN = 25, Path("search/plan.json")
TARGET = (
    "[{scenario: {gpu: cpu, num_gpus: 1, prompt_tokens: 96, generated_tokens: 48, kv_dtype: bfloat16, expert_dtype: "
    "bfloat16}, budget: {}}]"
)
Cells = dict[str, dict[str, dict[str, float]]]  # ranking -> plan -> measure -> value


def stage(recipe: str, run_dir: Path, *words: str) -> dict[str, float]:
    """Run a recipe unless it has run; return its results."""
    if not is_complete(run_dir):
        run(f"recipes/{recipe}.yaml", [f"--run_dir={run_dir}", *words])
    results: dict[str, float] = json.loads((run_dir / "run.json").read_text())["results"]
    return results


class Choice:
    """The stages of one parent.

    Args:
        parent: its folder.
        folder: where everything is kept.
    """

    def __init__(self, parent: Path, folder: Path) -> None:
        self.parent, self.folder = parent, folder
        self.experts = int(read_json(parent / "config.json")["num_local_experts"])
        self.documents = folder / "generate" / "documents"

    def generate(self) -> None:
        """Make the documents: every 16th is held out, the others are distilled on."""
        prompts = ("--prompts.num_prompts=2048", "--prompts.seed=1000")
        stage("generate", self.folder / "generate", f"--parent={self.parent}", *prompts)

    def importance(self, seed: int, ranking: str) -> Path:
        """Make an importance score, after those that it needs; return its folder."""
        place = self.folder / f"seed{seed}" / ranking
        if ranking == "geometric_mean":
            parts = [str(self.importance(seed, one)) for one in GEOMETRIC]
            stage("combine_importance", place, f"--parent={self.parent}", f"--importances={json.dumps(parts)}")
            return place
        first = self.folder / f"seed{seed}" / "leave_one_out"
        data = [f"--data.init_args.parent={self.parent}", f"--data.init_args.prompts.seed={seed}"]
        data += ["--data.init_args.prompts.num_prompts=128"]
        if place != first:
            self.importance(seed, "leave_one_out")
            data += [f"--data.init_args.sequences={first}/calibration.jsonl"]
        if ranking == "final_kl":
            stage("final_kl", place, f"--parent={self.parent}", *data)
        else:
            method = f"--model.init_args.method=lit_puzzle.importance.expert_scores.{METHODS[ranking]}"
            stage("importance", place, f"--model.init_args.parent={self.parent}", method, *data)
        return place

    def scores(self, seed: int, ranking: str) -> tuple[Path, Path]:
        """Make library and scores of a ranking; return their folders."""
        place = self.folder / f"seed{seed}"
        library, score = place / f"library_{ranking}", place / f"score_{ranking}"
        counts = json.dumps([self.experts // 4, self.experts // 2, 3 * self.experts // 4])
        if ranking == "best_of":
            beside = {one: str(self.importance(seed, one)) for one in BEST_OF[1:]}
            named = [f"--importance={self.importance(seed, BEST_OF[0])}", f"--beside={json.dumps(beside)}"]
        else:
            named = [f"--importance={self.importance(seed, ranking)}"]
        parent = f"--parent={self.parent}"
        stage("library", library, parent, *named, f"--experts={counts}", "--windows=[]")
        data = [f"--data.init_args.sequences={place}/leave_one_out/calibration.jsonl", "--evaluations=null"]
        stage("score", score, parent, f"--library={library}", *data)
        return library, score

    def child(self, seed: int, ranking: str, plan: str) -> Path:
        """Make a child; return the folder of its plan and measurements: an earlier ranking's, if that has this plan."""
        place = self.folder / f"seed{seed}" / f"{plan}_{ranking}"
        library, score = self.scores(seed, ranking)
        words = [f"--library={library}", f"--scores={score}", f"--constraints.targets={TARGET}"]
        words += ["--constraints.sweep=null", "--objective.window_metric=null"]
        words += [f"--constraints.limits.total_parameters={self.half()}"]
        words += ["--space.uniform_experts=true"] if plan == "uniform" else []
        stage("search", place / "search", *words)
        for earlier in RANKINGS[: RANKINGS.index(ranking)]:
            other = place.with_name(f"{plan}_{earlier}")
            if is_complete(other / "assemble") and Plan.load(other / PLAN) == Plan.load(place / PLAN):
                return other
        stage("assemble", place / "assemble", f"--parent={self.parent}", f"--plan={place}/search/plan.json")
        return place

    def half(self) -> int:
        """Return the number of parameters with half of the experts in every layer."""
        config = read_json(self.parent / "config.json")
        return count_parameters(config | {"num_local_experts": self.experts // 2})

    def measure(self, place: Path, distilled: bool, seed: int) -> dict[str, float]:
        """Return KL and accuracy of the child in a folder, and with `distilled` those after a short distillation."""
        children, found = {"before": place / "assemble" / "child"}, {}
        parent = f"--parent={self.parent}"
        if distilled:
            words = [f"--model.init_args.child={children['before']}", f"--model.init_args.parent={self.parent}"]
            words += [f"--data.init_args.documents={self.documents}", f"--trainer.max_steps={STEPS}"]
            words += ["--trainer.val_check_interval=1000", "--trainer.limit_val_batches=0", "--trainer.callbacks=null"]
            words += [f"--seed_everything={seed}", "--model.init_args.evaluation.prompts_per_effort=2"]
            stage("distill", place / "distill", *words)
            children["after"] = place / "distill" / "child"
        for when, child in children.items():
            where = (f"--checkpoint={child}", parent, f"--documents={self.documents}")
            found[f"KL {when}"] = stage("text_distance", place / f"distance_{when}", *where)["kl"]
            problems = (f"--checkpoint={child}", "--held_out.prompts_per_effort=128", "--held_out.texts=false")
            found[f"accuracy {when}"] = stage("evaluate", place / f"evaluate_{when}", *problems)["accuracy"]
        return found


def report(found: Sequence[Cells]) -> None:
    """Print a table per measure and a JSON line; `found` has one entry per seed."""
    for measured in ("KL before", "accuracy before", "KL after", "accuracy after"):
        print(f"\n{measured}\n| experts by | uniform | against leave-one-out | searched | against leave-one-out |")
        for ranking in found[0]:
            cells = []
            for plan in ("uniform", "searched"):
                rows = [
                    (cell[ranking][plan].get(measured), cell["leave_one_out"][plan].get(measured)) for cell in found
                ]
                pairs = [(value, first) for value, first in rows if value is not None and first is not None]
                if not pairs:
                    cells += ["", ""]
                    continue
                gains = [value - first for value, first in pairs]
                error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
                cells += [f"{statistics.mean(value for value, _ in pairs):.3f}"]
                cells += [f"{statistics.mean(gains):+.3f} ± {error:.3f}"]
            print(f"| {ranking} | {' | '.join(cells)} |")
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", type=Path, default=Path("lit_puzzle/assets/tiny_parent"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rankings", nargs="+", default=list(RANKINGS))
    parser.add_argument("--distilled", nargs="*", default=["leave_one_out", "geometric_mean"])
    parser.add_argument("--part", default="0/1", help="which seeds: N/OF")
    parser.add_argument("--folder", type=Path, default=Path("runs/expert_choice"))
    given = parser.parse_args()
    if given.rankings[:1] != ["leave_one_out"]:
        parser.error("--rankings begins with leave_one_out, which the others are compared with")
    own, parts = map(int, given.part.split("/"))
    choice = Choice(given.parent, given.folder)
    choice.generate()
    found: list[Cells] = []
    for distilling in (False, True):  # all children once before any is distilled
        found = [
            {
                ranking: {
                    plan: choice.measure(
                        choice.child(seed, ranking, plan), distilling and ranking in given.distilled, seed
                    )
                    for plan in ("uniform", "searched")
                }
                for ranking in given.rankings
            }
            for seed in given.seeds[own::parts]
        ]
    if parts == 1:
        report(found)


if __name__ == "__main__":
    main()
