"""Bench: what `--plan` says of `frontier` against the memory that the rows of two evaluations take.

    python scripts/bench/footprint_rows.py

Writes files of random rows (texts do not compress as answers do: their columns are what counts), and reads each twice,
as `frontier` reads parent and child, in a fork of this process: anonymous memory above what it was, read every 2 ms.
The stage's own tables and pictures are not in it. Prints a row for each file and one JSON line.
"""

import json
import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path

from footprint import MIB, anonymous, apart, import_all

FILES = ((10_000, 400), (20_000, 4_000), (60_000, 400))  # rows, characters of a completion


def write(folder: Path, rows: int, characters: int) -> None:
    """Write a file of random rows with texts."""
    from lit_puzzle.environments.episodes import EPISODES_FILE, Episode, Request, Texts, write_rows
    from lit_puzzle.environments.verdict import Verdict

    draw, verdict = random.Random(rows), Verdict(1.0, "", analysis=True, looping=False)

    def text(length: int) -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz     ", k=length))

    def episode(row: int) -> Episode:
        texts, problem = Texts(text(200), text(characters), "7"), draw.randrange(2**32)
        return Episode("Chains", "low", problem, verdict, 40, row=row, request=Request(80, 1.0), texts=texts)

    write_rows(folder / EPISODES_FILE, [episode(row) for row in range(rows)])


def read(folder: Path) -> float:
    """Return the bytes that both evaluations' rows take, in a fork of this process."""
    from lit_puzzle.environments.episodes import EPISODES_FILE, read_rows

    before = anonymous(os.getpid())
    pid = os.fork()
    if not pid:
        rows = [read_rows(folder / EPISODES_FILE) for _ in range(2)]
        os._exit(0 if all(rows) else 1)
    most = 0
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        most = max(most, anonymous(pid))
        time.sleep(0.002)
    return float(most - before)


def planned(folder: Path) -> float:
    """Return the bytes by the formulas."""
    from lit_puzzle.footprint.plan import make_plan
    from lit_puzzle.run.commands import target_of
    from lit_puzzle.run.recipe import load_recipe

    words = [f"--parent={folder}", f"--child={folder}", "--gpu=cpu"]
    plan = make_plan(load_recipe("recipes/frontier.yaml"), "frontier", target_of("frontier"), words)
    assert plan is not None
    return plan.footprint.peak_bytes


def main() -> None:
    """Measure, compare, print."""
    import_all()
    print("| rows | characters | predicted, MiB | measured, MiB | error |")
    print("|---|---|---|---|---|")
    rows = []
    for count, characters in FILES:
        folder = Path(tempfile.mkdtemp(prefix="footprint_rows"))
        apart(partial(write, folder, count, characters))
        expected, found = apart(partial(planned, folder)), read(folder)
        print(
            f"| {count:,} | {characters:,} | {expected / MIB:.0f} | {found / MIB:.0f} | {expected / found - 1:+.1%} |"
        )
        rows.append({"rows": count, "characters": characters, "predicted": expected, "measured": found})
    print(json.dumps({"name": "footprint_rows", "rows": rows}))


if __name__ == "__main__":
    main()
