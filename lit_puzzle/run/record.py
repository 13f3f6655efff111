"""The record of a finished run, `run.json`: written last and atomically, it makes the run complete.

run.json: recipe, command, git commit, versions, seed, hardware, `ended` (UTC, ISO 8601, in microseconds), seconds and
peak memory of the last attempt, `inputs` and `outputs` (`lit_puzzle.run.inputs`), and `results`, a flat dict of the
run's headline numbers.
"""

import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lit_puzzle.run.files import write_json
from lit_puzzle.run.folder import OUTPUTS_FILE, PACKAGE, RECORD
from lit_puzzle.run.inputs import recorded_inputs, recorded_outputs

PACKAGES = (
    *("lit-puzzle", "torch", "lightning", "transformers", "trl", "peft", "torchmetrics", "safetensors"),
    *("highspy", "numpy", "aiconfigurator-core", "pyarrow"),  # of the search
)


@dataclass
class RunClock:
    """Measures the time of a run from its construction and writes the run's record."""

    started: float = field(default_factory=time.monotonic)

    def close(
        self, run_dir: Path, recipe: Path, seed: int | None, resumed: bool, results: Mapping[str, float | int | str]
    ) -> None:
        """Write `run.json`, which makes the run complete.

        Args:
            run_dir: the run folder.
            recipe: path of the recipe.
            seed: of the run, if it has one.
            resumed: whether the run was resumed.
            results: headline numbers.
        """
        record = {
            "recipe": str(recipe),
            "command": shlex.join(["lightning", *sys.argv[1:]]),
            "git_commit": git_commit(),
            "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "seed": seed,
            "hardware": hardware(),
            "resumed": resumed,
            "ended": datetime.now(UTC).isoformat(timespec="microseconds"),
            "seconds": round(time.monotonic() - self.started, 3),
            "cpu_seconds": round(time.process_time(), 3),
            "peak_memory_gib": peak_memory_gib(),
            "inputs": {name: identity.to_json() for name, identity in recorded_inputs(run_dir).items()},
            "outputs": {name: identity.to_json() for name, identity in recorded_outputs(run_dir).items()},
            "results": dict(results),
        }
        write_json(run_dir / RECORD, record, indent=2)
        (run_dir / OUTPUTS_FILE).unlink(missing_ok=True)


def git_commit() -> str | None:
    """Return the commit of this code, with `+changes` if the tree differs from it; None outside a checkout."""
    # `describe --dirty` would lock the checkout, and the lock would outlive a run that is killed.
    git = ["git", "--no-optional-locks", "-C", str(PACKAGE)]
    commands = ["describe", "--always", "--abbrev=40"], ["status", "--porcelain", "--untracked-files=no"]
    try:
        commit, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changes else commit


def hardware() -> dict[str, Any]:
    """Return processor, cores and GPUs of the machine (GPUs only if torch is loaded: it is not imported here)."""
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {"machine": platform.machine(), "cpu_cores": os.cpu_count(), "gpus": gpus}


def peak_memory_gib() -> dict[str, float]:
    """Return the largest resident size of this process and the largest allocation on each GPU, in GiB."""
    peak = {"cpu": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)}
    torch = sys.modules.get("torch")
    if torch is None:
        return peak
    gpus = range(torch.cuda.device_count())
    return peak | {f"gpu{index}": round(torch.cuda.max_memory_allocated(index) / 2**30, 3) for index in gpus}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
