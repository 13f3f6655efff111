"""Bench: the formulas of `--plan` against measured peaks of every stage, at three sizes, in one process and in two.

    python scripts/bench/footprint.py [--stages importance distill ...] [--processes 1 2] [--sizes 0 1 2 3 4] [--keep D]

Makes random parents and data (`footprint_stages.py`, `footprint_copies.py`), and runs each stage's own recipe on CPU
processes (gloo), one run at a time. Measured is anonymous memory (RssAnon): pages of files do not count, and other
processes on the machine do not change it. Every run is a fork of a process that has imported all; it is read every 2
ms, above what it was then. Freed memory returns to the system at once (M_MMAP_THRESHOLD), and there are no huge pages.
Prints a row for each run, with its CPU seconds, and one JSON line at the end; a run that fails says so in its row.
"""

import argparse
import ctypes
import importlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from footprint_copies import COPIES, SHAPES, copies, is_made, make_copy_inputs
from footprint_stages import (
    EXPERTS,
    IN_TWO,
    LAYERS,
    ONE_PROCESS,
    PROMPT_TOKENS,
    SHARDED,
    TOKENS,
    TRAINING,
    make_inputs,
    stages,
)

MIB = 2**20
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
MODULES = (
    *("peft", "matplotlib.pyplot", "pyarrow.parquet", "lit_puzzle.training.lightning"),
    *("lit_puzzle.rl.module", "lit_puzzle.rl.trl_engine", "lit_puzzle.data.rl_prompts", "lit_puzzle.data.documents"),
    *("lit_puzzle.distill.global_kd", "lit_puzzle.distill.blocks", "lit_puzzle.distill.top_logits"),
    *("lit_puzzle.importance.importance", "lit_puzzle.data.calibration", "lit_puzzle.kv_cache.calibrate"),
    *("lit_puzzle.scoring.scoring", "lit_puzzle.scoring.final_kl"),
    *("lit_puzzle.data.generate", "lit_puzzle.evaluate.accuracy"),
    *("lit_puzzle.evaluate.text_distance", "lit_puzzle.tiny.pretrain", "lit_puzzle.serve.export"),
    *(
        "lit_puzzle.child.assemble",
        "lit_puzzle.child.average",
        "lit_puzzle.search.search",
        "scipy.optimize",
        "lit_puzzle.library.candidates",
        "lit_puzzle.cli",
        "lit_puzzle.footprint.before_run",
    ),
    *("omegaconf", "attrs", "torch.profiler", "rich._emoji_codes", "matplotlib.backends", "PIL.JpegImagePlugin"),
)


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        stage: its name.
        processes: that ran it.
        size: index of the size.
        predicted: bytes by the formulas.
        measured: bytes above those after importing.
        phase: the fullest, by the formulas.
        cpu_seconds: of all its processes.
        failure: end of what it printed, where it failed.
    """

    stage: str
    processes: int
    size: int
    predicted: float
    measured: float
    phase: str
    cpu_seconds: float
    failure: str

    def line(self) -> str:
        """Return the row of the table."""
        found = f"{self.measured / MIB:.0f} | {100 * (self.predicted / self.measured - 1):+.1f}%"
        measured = "failed | " if self.failure else found
        if self.stage in COPIES:
            layers, experts, hidden = SHAPES[self.stage][self.size]
            of = f"{layers} | {experts} experts of {hidden}"
        else:
            of = f"{LAYERS[self.size]} | {EXPERTS[self.size]} experts, {TOKENS[self.size]:,}"
        sizes = f"{self.stage} | {self.processes} | {of}"
        return f"| {sizes} | {self.predicted / MIB:.0f} | {measured} | {self.phase} | {self.cpu_seconds:.0f} |"


def import_all() -> None:
    """Import what the stages import, once: every run is a fork of this process."""
    allocator = ctypes.CDLL(None)
    allocator.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    allocator.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
    for name in MODULES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    allocator.malloc_trim(0)


def anonymous(pid: int) -> int:
    """Return the anonymous bytes of a process, or 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * int(status.split("RssAnon:")[1].split()[0]) if "RssAnon:" in status else 0


def start(words: list[str], out: Path, rank: int, processes: int, port: int) -> int:
    """Fork a process that runs a recipe; return its number."""
    pid = os.fork()
    if pid:
        return pid
    log = os.open(out / f"log{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from lit_puzzle.cli import main as run

    code = 1
    try:
        run(["run", *words])
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()  # the process ends below, before Python would print it
        raise
    finally:
        sys.stdout.flush()
        os._exit(code)


def asked(folder: Path, stage: str, size: int, processes: int) -> tuple[str, list[str]]:
    """Return the recipe and the overrides of a stage."""
    return copies(folder, size)[stage] if stage in COPIES else stages(folder, size, processes)[stage]


def make(folder: Path, stage: str, size: int) -> None:
    """Write what a stage reads, unless it is there."""
    shared = folder / f"size_{size}" / "library" / "library.json"
    if is_made(folder, stage, size) if stage in COPIES else shared.is_file():
        return
    os.environ |= QUIET
    apart(lambda: make_copy_inputs(folder, stage, size) if stage in COPIES else make_inputs(folder, size))


def apart(work: Callable[[], Any]) -> Any:
    """Return what a function returns in a fork of this process, whose memory stays as it is."""
    reading, writing = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: writing.send(work()))
    process.start()
    writing.close()
    try:
        return reading.recv()
    except EOFError:
        raise RuntimeError("it failed, as it says above") from None
    finally:
        process.join()


def measured(folder: Path, stage: str, size: int, processes: int) -> tuple[float, float, str]:
    """Return the largest peak of the processes of a run in bytes, their CPU seconds, and why it failed if it did."""
    recipe, words = asked(folder, stage, size, processes)
    out = Path(tempfile.mkdtemp(dir=folder))
    run = [f"recipes/{recipe}.yaml", f"--run_dir={out / 'run'}", "--force", *words]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ctypes.CDLL(None).malloc_trim(0)  # what is free in this process, a fork could use unseen
    base, seconds = anonymous(os.getpid()), 0.0
    running = {start(run, out, rank, processes, port): rank for rank in range(processes)}
    peaks, failed = dict.fromkeys(running, 0), ""
    while running:
        for pid in list(running):
            peaks[pid] = max(peaks[pid], anonymous(pid))
            done, code, used = os.wait4(pid, os.WNOHANG)
            if done:
                rank, seconds = running.pop(pid), seconds + used.ru_utime + used.ru_stime
                failed = failed or ("" if code == 0 else (out / f"log{rank}").read_text()[-1500:])
        time.sleep(0.002)
    return float(max(peaks.values()) - base), seconds, failed


def predicted(folder: Path, stage: str, size: int, processes: int) -> tuple[float, str]:
    """Return the peak by the formulas in bytes, and the phase that it is in."""
    from lit_puzzle.footprint.plan import make_plan
    from lit_puzzle.run.commands import target_of
    from lit_puzzle.run.recipe import load_recipe

    name, words = asked(folder, stage, size, processes)
    recipe = load_recipe(f"recipes/{name}.yaml")
    command = recipe.value("command")
    options = [f"--gpus={processes}", "--gpu=cpu", f"--prompt_tokens={PROMPT_TOKENS}"]
    plan = make_plan(recipe, command, target_of(command), [*words, *options])
    assert plan is not None
    return plan.footprint.peak_bytes, plan.footprint.fullest.name


def main(chosen: argparse.Namespace) -> None:
    """Measure, compare, print."""
    folder = Path(chosen.keep or tempfile.mkdtemp(prefix="footprint"))
    folder.mkdir(exist_ok=True)
    import_all()
    print("| stage | processes | layers | tokens | predicted, MiB | measured, MiB | error | fullest | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for stage in chosen.stages or (*SHARDED, *TRAINING, *ONE_PROCESS, *COPIES):
        for processes in chosen.processes if stage in (*SHARDED, *TRAINING) else [1]:
            for size in chosen.sizes:
                if size in IN_TWO and (processes == 1 or stage not in IN_TWO[size]):
                    continue
                make(folder, stage, size)
                expected, phase = apart(partial(predicted, folder, stage, size, processes))
                found, seconds, failure = measured(folder, stage, size, processes)
                rows.append(Row(stage, processes, size, expected, found, phase, seconds, failure))
                print(rows[-1].line(), flush=True)
                if failure:
                    print(failure, file=sys.stderr, flush=True)
    print(json.dumps({"name": "footprint", "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="*", help="default: all")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of five")
    parser.add_argument("--keep", help="folder for parents and data, which a second bench finds there")
    main(parser.parse_args())
