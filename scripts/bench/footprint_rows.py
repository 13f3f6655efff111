"""Bench: what `--plan` says of `frontier` against the memory that it takes: of reading rows, and of the whole stage.

    python scripts/bench/footprint_rows.py

Writes files of random rows (texts do not compress as answers do: their columns are what counts), reads each twice, as
`frontier` reads parent and child, and runs `frontier` on it as parent and child, each in a fork of this process:
anonymous memory above what it was, read every 2 ms. Each row is one prompt, but in the second file a prompt has two.
Prints two rows for each file, the phase that is measured and the stage, and one JSON line.
"""

import importlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from footprint import MIB, anonymous, apart, import_all

FILES = ((10_000, 400, 1), (20_000, 4_000, 2), (60_000, 400, 1))  # rows, characters of a completion, rows of a prompt


def write(folder: Path, rows: int, characters: int, samples: int) -> None:
    """Write a file of random rows with texts."""
    from lit_puzzle.environments.episodes import EPISODES_FILE, Episode, Request, Texts, write_rows
    from lit_puzzle.environments.verdict import Verdict

    draw, verdict = random.Random(rows), Verdict(1.0, "", analysis=True, looping=False)

    def text(length: int) -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz     ", k=length))

    def episode(row: int) -> Episode:
        texts, problem = Texts(text(200), text(characters), "7"), row // samples
        return Episode("Chains", "low", problem, verdict, 40, row=row, request=Request(80, 1.0), texts=texts)

    write_rows(folder / EPISODES_FILE, [episode(row) for row in range(rows)])


def read(folder: Path) -> bool:
    """Read the rows of both evaluations."""
    from lit_puzzle.environments.episodes import EPISODES_FILE, read_rows

    both = [read_rows(folder / EPISODES_FILE) for _ in range(2)]
    return all(both)


def judge(folder: Path) -> bool:
    """Run the stage, with throughputs that are made up."""
    from lit_puzzle.costs.throughputs import THROUGHPUT_FILE
    from lit_puzzle.report.frontier import frontier
    from lit_puzzle.run.files import write_json

    stated = {"parent": 10.0, "child": 30.0, "kind": "stated", "scenario": "a machine", "tried": {}}
    write_json(folder / THROUGHPUT_FILE, stated)
    (folder / "run").mkdir()
    return bool(frontier(folder / "run", folder, folder, folder, reference_effort="low"))


def measured(work: Callable[[Path], bool], folder: Path) -> float:
    """Return the bytes that some work takes in a fork of this process."""
    before = anonymous(os.getpid())
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = 0 if work(folder) else 1
        finally:
            os._exit(code)
    most = 0
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        most = max(most, anonymous(pid))
        time.sleep(0.002)
    if ended[1]:
        raise SystemExit(f"{work.__name__} failed")
    return float(most - before)


def planned(folder: Path) -> tuple[float, float]:
    """Return the bytes of reading rows, and of the stage, by the formulas."""
    from lit_puzzle.footprint.plan import make_plan
    from lit_puzzle.run.commands import target_of
    from lit_puzzle.run.recipe import load_recipe

    words = [f"--parent={folder}", f"--child={folder}", "--gpu=cpu"]
    plan = make_plan(load_recipe("recipes/frontier.yaml"), "frontier", target_of("frontier"), words)
    assert plan is not None
    phases = {phase.name: phase.peak_bytes for phase in plan.footprint.phases}
    return phases["rows"], plan.footprint.peak_bytes


def main() -> None:
    """Measure, compare, print."""
    import_all()
    importlib.import_module("lit_puzzle.report.frontier")
    print("| what | rows | characters | predicted, MiB | measured, MiB | error |")
    print("|---|---|---|---|---|---|")
    rows = []
    for count, characters, samples in FILES:
        folder = Path(tempfile.mkdtemp(prefix="footprint_rows"))
        apart(partial(write, folder, count, characters, samples))
        for work, expected in zip((read, judge), apart(partial(planned, folder)), strict=True):
            found = measured(work, folder)
            sizes = f"{expected / MIB:.0f} | {found / MIB:.0f} | {expected / found - 1:+.1%}"
            print(f"| {work.__name__} | {count:,} | {characters:,} | {sizes} |", flush=True)
            row = {"what": work.__name__, "rows": count, "characters": characters}
            rows.append(row | {"predicted": expected, "measured": found})
    print(json.dumps({"name": "footprint_rows", "rows": rows}))


if __name__ == "__main__":
    main()
