"""Cheap stages without torch, for pipelines of tests: each reads files and writes one, slowly or not at all.

A test copies this file beside its recipes as `cheap_stages.py`: the recipes name it as code of the user.
"""

import os
import sys
import time
from pathlib import Path

from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import file_identity
from lit_puzzle.run.inputs import claim_inputs, record_output


def write(
    run_dir: Path,
    text: str = "",
    reads: list[Path] | None = None,
    steps: int = 1,
    fails: bool = False,
    records: bool = True,
) -> dict[str, float]:
    """Write `out.txt`, what is read and a text; `steps.txt` grows by a line a step, a tenth of a second each.

    `fails`: whether it does, as long as there is no file `mended`.
    `records`: whether the content of `out.txt` is recorded.
    """
    folders = [require_input(Path(folder), "upstream", "out.txt") for folder in reads or []]
    claim_inputs(run_dir, {str(place): file_identity(folder, ["out.txt"]) for place, folder in enumerate(folders)})
    if fails and not Path("mended").exists():
        print("something to say", file=sys.stderr)
        raise ValueError("this stage refuses: 3 is too many; give 2")
    (run_dir / "pid.csv").write_text(str(os.getpid()))
    done = len((run_dir / "steps.txt").read_text().splitlines()) if (run_dir / "steps.txt").is_file() else 0
    for step in range(done, steps):
        with (run_dir / "steps.txt").open("a") as stream:
            stream.write(f"{step} {os.getpid()}\n")
        time.sleep(0.1)
    (run_dir / "out.txt").write_text("".join((folder / "out.txt").read_text() for folder in folders) + text)
    print(f"wrote {text!r}")
    if records:
        record_output(run_dir, "out", file_identity(run_dir, ["out.txt"]))
    return {"steps": float(steps)}
