"""The long form of tests/faults: every hostile input, many kills of every stage, full disks; prints the counts.

    python scripts/faults.py corpus                       all hostile inputs
    python scripts/faults.py corpus --names=template      those whose name matches a regular expression
    python scripts/faults.py kills --trials=10            kills before random changes of the file system, of each stage
    python scripts/faults.py writes --trials=5            ends inside a write, of each stage
    python scripts/faults.py disk --trials=5              full disks, of each stage
    python scripts/faults.py kills --stages=score,search  of some stages
    python scripts/faults.py rl --trials=5                kills of RL recovery in a rollout, a loss, a backward pass, an
                                                          update, a file; adapters and weights, one process and two

One process imports the project and forks one child a command. Exit code 1 if anything went wrong.
"""

import argparse
import itertools
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import TINY
from faults.case import Trials
from faults.cases import TABLES
from faults.commands import Server
from faults.interruptions import Interruptions, kill_points
from faults.world import STAGES, World
from helpers.killed_recovery import KINDS, Kills
from helpers.recovery_runs import make_child
from transformers import GptOssConfig

Outcome = tuple[str, str, str]  # table or stage; what was tried; what is wrong, or ""


def corpus(trials: Trials, names: str) -> Iterator[Outcome]:
    """Try the cases whose names match."""
    for table, cases in TABLES.items():
        for case in cases:
            if re.search(names, case.name):
                yield table, f"[{case.owner}] {case.name}", trials.fault(case) or ""


def kills(trials: Trials, stages: list[str], count: int, seed: int) -> Iterator[Outcome]:
    """Kill each stage before random changes of the file system; every third trial also kills the second attempt."""
    interruptions = Interruptions(trials)
    for stage in stages:
        points = kill_points(seed, stage, len(interruptions.whole(stage).changes), count)
        for trial, number in enumerate(points):
            again = (1 + number // 2,) if trial % 3 == 2 else ()
            where, wrong = interruptions.killed(stage, number, *again)
            yield stage, f"killed before: {where}", wrong


def writes(trials: Trials, stages: list[str], count: int, seed: int) -> Iterator[Outcome]:
    """End each stage inside the write of a file beyond a random size."""
    interruptions = Interruptions(trials)
    for stage in stages:
        draw, largest = random.Random(f"{seed} {stage}"), interruptions.whole(stage).largest
        for _ in range(count):
            yield stage, *interruptions.torn(stage, draw.randrange(1, largest))


def disk(trials: Trials, stages: list[str], count: int, seed: int) -> Iterator[Outcome]:
    """Run each stage on a disk that is full beyond a random size of a file, then with room again."""
    interruptions = Interruptions(trials)
    for stage in stages:
        draw, largest = random.Random(f"{seed} {stage}"), interruptions.whole(stage).largest
        for file_bytes in [0, *(draw.randrange(1, largest) for _ in range(count - 1))]:
            yield stage, *interruptions.full_disk(stage, file_bytes)


def rl(folder: Path, count: int, seed: int) -> Iterator[Outcome]:
    """Kill RL recovery at random moments, adapters and weights, in one process and two; every third trial twice."""
    child = make_child(folder / "child", GptOssConfig(**TINY | {"num_hidden_layers": 2}))
    for lora, processes in itertools.product((True, False), (1, 2)):
        name = f"{'adapters' if lora else 'weights'}, {processes} processes"
        kills, draw = Kills(folder / name, child, lora, processes), random.Random(f"{seed} {name}")
        for trial in range(count):
            kinds = draw.choices(KINDS, k=2 if trial % 3 == 2 else 1)
            moments = [kills.draw(draw, kind) for kind in kinds]
            where = ", ".join(f"{kind} {number} of process {rank}" for rank, kind, number in moments)
            print(f"{name}: killed in {where}", file=sys.stderr, flush=True)
            yield f"rl_recover, {name}", f"killed in {where}", kills.wrong(*moments)


def main() -> None:
    """Try what the command line names and print a line for each fault and a table of counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["corpus", "kills", "writes", "disk", "rl"])
    parser.add_argument("--names", default="", help="regular expression of names of cases")
    parser.add_argument("--stages", default=",".join(STAGES), help="stages, separated by commas")
    parser.add_argument("--trials", type=int, default=4, help="of each stage")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults_") as scratch:
        if given.what == "rl":
            faults = report(rl(Path(scratch), given.trials, given.seed))
        else:
            with Server() as server:
                (Path(scratch) / "world").mkdir()
                trials = Trials(server, World(server, Path(scratch) / "world"), Path(scratch))
                faults = report(outcomes_of(given, trials))
    print(f"{time.monotonic() - started:.0f} seconds")
    sys.exit(1 if faults else 0)


def outcomes_of(given: argparse.Namespace, trials: Trials) -> Iterator[Outcome]:
    """Return what the command line asks for, of stages."""
    if given.what == "corpus":
        return corpus(trials, given.names)
    tried = {"kills": kills, "writes": writes, "disk": disk}
    return tried[given.what](trials, given.stages.split(","), given.trials, given.seed)


def report(outcomes: Iterator[Outcome]) -> int:
    """Print the faults as they come and, last, the counts; return the number of faults."""
    tried, wrong = Counter[str](), Counter[str]()
    for group, what, fault in outcomes:
        tried[group] += 1
        wrong[group] += bool(fault)
        if fault:
            print(f"{group}: {what}: {fault}", flush=True)
    print("\n| | tried | wrong |\n|---|---|---|")
    for group, count in [*tried.items(), ("all", tried.total())]:
        print(f"| {group} | {count} | {wrong.total() if group == 'all' else wrong[group]} |")
    return wrong.total()


if __name__ == "__main__":
    main()
