"""Bench: what `--plan` says of `report` against the memory that it takes: of drawing, of curves, and of rows.

    python scripts/bench/footprint_report.py

Writes folders of runs: a plan and the importance of 36 layers of 128 experts, trainings with random metrics, and a
frontier of two evaluations with random rows (`footprint_rows.py`). Runs `report` on each in a fork of this process:
anonymous memory above what it was, read every 2 ms. Prints a row for each folder, and one JSON line.
"""

import importlib
import json
import os
import random
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path

from footprint import MIB, apart, import_all
from footprint_rows import measured, write

LAYERS, EXPERTS = 36, 128
DRAWN = ("train/reward", "val/accuracy/low", "val/accuracy/high", "val/tokens/low", "val/tokens/high")


@dataclass(frozen=True)
class Size:
    """What a report is of.

    Attributes:
        rows: of each evaluation; 0: no frontier.
        characters: of a completion.
        trainings: runs with metrics.
        updates: of each.
        metrics: that each update logs, `DRAWN` among them.
    """

    rows: int = 0
    characters: int = 0
    trainings: int = 0
    updates: int = 0
    metrics: int = 0


SIZES = (
    Size(),
    Size(trainings=1, updates=20_000, metrics=40),
    Size(trainings=2, updates=50_000, metrics=40),
    Size(trainings=1, updates=50_000, metrics=5),
    Size(trainings=4, updates=20_000, metrics=8),
    Size(10_000, 400, 8, 1_000, 40),
    Size(60_000, 400, 8, 1_000, 40),
    Size(200_000, 400, 8, 1_000, 40),
)


def record(folder: Path, command: str, **inputs: Path) -> Path:
    """Make a folder a complete run of a command, whose inputs are evaluations; return it."""
    from lit_puzzle.environments.episodes import EPISODES_FILE
    from lit_puzzle.run.folder import CONFIG
    from lit_puzzle.run.identity import file_identity
    from lit_puzzle.run.inputs import claim_inputs
    from lit_puzzle.run.record import RunClock

    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(f"command: {command}\nrun_dir: {folder}\n")
    claim_inputs(folder, {name: file_identity(path, [EPISODES_FILE]) for name, path in inputs.items()})
    RunClock().close(folder, Path(f"recipes/{command}.yaml"), 7, False, {})
    return folder


def make(runs: Path, size: Size) -> None:
    """Write a folder of runs."""
    import torch

    from lit_puzzle.importance.importance_file import Importance
    from lit_puzzle.report.frontier import FRONTIER_FILE
    from lit_puzzle.run.files import write_json
    from lit_puzzle.spec import BlockSpec, Plan

    scores = tuple(torch.rand(EXPERTS).double() + 0.1 for _ in range(LAYERS))
    Importance("f", "leave_one_out", 100, scores).save(record(runs / "importance", "validate"))
    (record(runs / "manual", "manual") / "child").mkdir()
    blocks = tuple(BlockSpec(tuple(range(8 + layer)), None if layer % 2 else 128) for layer in range(LAYERS))
    Plan("0" * 64, EXPERTS, blocks).save(runs / "manual" / "child" / "plan.json")
    for number in range(size.trainings):
        train(record(runs / f"train_{number}", "fit") / "logs" / "metrics.csv", size)
    if size.rows:
        for model in ("parent", "child"):
            write(record(runs / model, "evaluate"), size.rows, size.characters, 1)
        write_json(
            record(runs / "frontier", "frontier", parent=runs / "parent", child=runs / "child") / FRONTIER_FILE, {}
        )


def train(file: Path, size: Size) -> None:
    """Write random metrics."""
    draw, names = random.Random(0), [*DRAWN, *(f"other/{number}" for number in range(size.metrics - len(DRAWN)))]
    file.parent.mkdir()
    with file.open("w") as stream:
        print("step", *names, sep=",", file=stream)
        for update in range(size.updates):
            print(update, *(draw.random() for _ in names), sep=",", file=stream)


def draw(runs: Path) -> bool:
    """Run the stage."""
    from lit_puzzle.report.report import report

    (runs.parent / "report").mkdir()
    with redirect_stdout(Path(os.devnull).open("w")):
        return bool(report(runs.parent / "report", [runs]))


def planned(runs: Path) -> float:
    """Return the bytes of the stage by the formulas."""
    from lit_puzzle.footprint.plan import make_plan
    from lit_puzzle.run.commands import target_of
    from lit_puzzle.run.recipe import load_recipe

    words = [f"--folders=[{runs}]", "--gpu=cpu"]
    plan = make_plan(load_recipe("recipes/report.yaml"), "report", target_of("report"), words)
    assert plan is not None
    return plan.footprint.peak_bytes


def main() -> None:
    """Measure, compare, print."""
    import_all()
    importlib.import_module("lit_puzzle.report.report")
    print("| rows of each | characters | trainings | updates | metrics | predicted, MiB | measured, MiB | error |")
    print("|---|---|---|---|---|---|---|---|")
    found = []
    for size in SIZES:
        runs = Path(tempfile.mkdtemp(prefix="footprint_report")) / "runs"
        apart(partial(make, runs, size))
        expected, taken = apart(partial(planned, runs)), measured(draw, runs)
        sizes = " | ".join(f"{number:,}" for number in astuple(size))
        print(f"| {sizes} | {expected / MIB:.0f} | {taken / MIB:.0f} | {expected / taken - 1:+.1%} |", flush=True)
        found.append(asdict(size) | {"predicted": expected, "measured": taken})
    print(json.dumps({"name": "footprint_report", "rows": found}))


if __name__ == "__main__":
    main()
