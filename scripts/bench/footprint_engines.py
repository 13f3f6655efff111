"""Bench: the formulas of `--plan` against measured peaks of the stages that start vLLM, at three sizes on a CPU.

    python scripts/bench/footprint_engines.py --python .venv-vllm/bin/python [--stages serve_check throughput]
        [--sizes 0 1 2]

Makes random parents, and runs the recipes of `serve_check` (without its server) and `throughput` (parent and child at a
time) on them. Measured is the anonymous memory of a command and all its processes together, at the fullest moment of
one read every 20 ms, above that of the same recipe on the tiny parent with a KV cache of 16 MiB; `--plan` is taken
above that of the same run. A process that has just been forked does not count: it shares the memory of its parent, for
longer where the machine is busy. Weights grow eightfold, KV caches fourfold. Prints a row for each run and one JSON
line. A random model may fail a check of `serve_check` (its experts hardly differ): what it holds is measured all the
same.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from footprint import MIB, anonymous
from footprint_copies import write_parent
from footprint_stages import TINY_PARENT

SHAPES = ((2, 16, 512), (4, 32, 512), (9, 32, 512))  # layers, experts, hidden = inner channels
CACHES_GIB = (1 / 16, 1 / 8, 1 / 4)
BASE_GIB = 1 / 64
STAGES = ("serve_check", "throughput")


def recipe_words(stage: str, model: Path, cache_gib: float, python: str) -> list[str]:
    """Return the recipe of a stage and its overrides."""
    words = [f"recipes/{stage}.yaml"]
    if stage == "serve_check":
        return [
            *(*words, f"--checkpoint={model}", f"--vllm.python={python}", "--vllm.server=false"),
            f"--vllm.kv_cache_gib={cache_gib}",
        ]
    workload = {"prompt_tokens": 96, "generated_tokens": 16, "batches": [8], "rounds": 1}
    kind: dict[str, Any] = {"python": python, "dtype": "float32", "execution": "eager", "clock": "cpu"}
    engines = kind | {"kv_cache_gib": cache_gib, "together": True}
    measuring = {"workload": workload, "engines": engines}
    source = {"class_path": "lit_puzzle.serve.vllm.measured.Measured", "init_args": measuring}
    return [*words, f"--parent={model}", f"--child={model}", f"--source={json.dumps(source)}"]


def planned(words: list[str]) -> float:
    """Return the bytes of the fullest moment by the formulas."""
    command = [sys.executable, "-m", "lit_puzzle", "run", *words, "--plan", "--json", "--gpu=cpu"]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["peak_bytes"])


def measured(words: list[str], folder: Path) -> tuple[float, int]:
    """Return the bytes of the fullest moment of a command and all its processes, and its exit code."""
    command = [sys.executable, "-m", "lit_puzzle", "run", *words, f"--run_dir={folder}", "--force"]
    most = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            most = max(most, held(process.pid))
            time.sleep(0.02)
    return float(most), process.returncode


def held(pid: int) -> int:
    """Return the anonymous bytes of a process and all that it has started, directly or not, but for new forks."""
    found, total, children = [(pid, anonymous(pid))], anonymous(pid), children_of_all()
    for one, bytes_of_one in found:
        started = [(child, anonymous(child)) for child in children.get(one, [])]
        total += sum(number for _, number in started if abs(number - bytes_of_one) > MIB)
        found += started
    return total


def children_of_all() -> dict[int, list[int]]:
    """Return the children of every process."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        children.setdefault(parent, []).append(int(stat.parent.name))
    return children


def main(chosen: argparse.Namespace) -> None:
    """Measure, compare, print."""
    folder, rows = Path(tempfile.mkdtemp(prefix="footprint_engines")), []
    os.environ |= {"OMP_NUM_THREADS": "1"}
    for number in chosen.sizes:
        write_parent(folder / f"parent_{number}", SHAPES[number])
    models = [(TINY_PARENT, BASE_GIB), *((folder / f"parent_{number}", CACHES_GIB[number]) for number in chosen.sizes)]
    print("| stage | layers x experts x hidden | predicted, MiB | measured, MiB | error | exit code |")
    print("|---|---|---|---|---|---|")
    for stage in chosen.stages:
        found = []
        for number, (model, gib) in enumerate(models):
            words = recipe_words(stage, model, gib, chosen.python)
            found.append((planned(words), *measured(words, folder / f"{stage}_{number}")))
        for number, (expected, peak, code) in zip(chosen.sizes, found[1:], strict=True):
            expected, peak = expected - found[0][0], peak - found[0][1]
            error, shape = expected / peak - 1, SHAPES[number]
            of = " x ".join(map(str, shape))
            print(f"| {stage} | {of} | {expected / MIB:.0f} | {peak / MIB:.0f} | {error:+.1%} | {code} |", flush=True)
            rows.append({"stage": stage, "shape": shape, "predicted": expected, "measured": peak, "exit_code": code})
    print(json.dumps({"name": "footprint_engines", "rows": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="interpreter of vLLM's environment")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 1, 2], help="of three")
    main(parser.parse_args())
