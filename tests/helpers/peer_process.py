"""One of two processes of a run that are connected as those of Lightning are, and end in one of several ways.

    python peer_process.py FOLDER WAY

WAY: `finish`, `two trainers` (connected twice, then the first process works longer), `late` (the second process is
still closing what it holds when the first one is gone), or how the second one ends in the middle of its work: `crash`,
`exit`. The first process starts the second one. Writes `FOLDER/rank` of each process that ends by itself.
"""

import ctypes
import faulthandler
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from lit_puzzle.run.peers import connect, end_with_starter, failing_together

MOMENTS = 5.0  # longer than a failure leaves the others


def broadcast(file: Path, rank: int, value: Any) -> Any:
    """Return on both processes what the first one gives."""
    if rank == 0:
        file.with_suffix(".part").write_text(json.dumps(value))
        file.with_suffix(".part").rename(file)
        return value
    while not file.exists():
        time.sleep(0.01)
    return json.loads(file.read_text())


def work(folder: Path, way: str, rank: int, other: subprocess.Popen[bytes] | None) -> None:
    """Connect, then end as told."""
    for trainer in range(2 if way == "two trainers" else 1):
        told = partial(broadcast, folder / f"address{trainer}", rank)
        connect(rank, 2, told, {} if other is None else {1: other})
    if rank and way == "crash":
        ctypes.string_at(0)
    if rank and way == "exit":
        os._exit(3)
    if rank == 0 and way in ("two trainers", "crash", "exit"):
        time.sleep(2 * MOMENTS)


def main() -> None:
    """Run one process."""
    folder, way, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ.get("LOCAL_RANK", "0"))
    faulthandler.enable()
    end_with_starter(rank)
    other = None if rank else subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {"LOCAL_RANK": "1"})
    with failing_together():
        work(folder, way, rank, other)
    if rank and way == "late":
        time.sleep(MOMENTS)
    (folder / str(rank)).touch()


if __name__ == "__main__":
    main()
