"""Run folders: one per recipe, complete when it contains `run.json`.

Writes `config.yaml` (the resolved recipe, first) and `run.json` (last, atomically). Between the two the folder is
incomplete, and the same command resumes it. Reads both to determine whether a command may use an existing folder.

run.json: recipe, command, git commit, versions, seed, hardware, seconds and peak memory of the last attempt, and
`results`, a flat dict of the run's headline numbers.
"""

import difflib
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from lit_puzzle.run.files import read_text, write_atomically, write_json
from lit_puzzle.run.recipe import recipe_that_makes
from lit_puzzle.run.renamed import renamed_in_config

PACKAGE = Path(__file__).parents[1]
CONFIG, RECORD = "config.yaml", "run.json"
OUTPUTS = ("dirpath", "save_dir", "default_root_dir")  # Lightning's names of folders to write
PACKAGES = (
    *("lit-puzzle", "torch", "lightning", "transformers", "trl", "peft", "torchmetrics", "safetensors"),
    *("highspy", "numpy", "aiconfigurator-core", "pyarrow"),  # of the search
)


def is_complete(folder: Path) -> bool:
    """Return whether a run folder is complete."""
    return (folder / RECORD).is_file()


def require_input(path: Path, purpose: str) -> Path:
    """Check that an input of a stage exists and that the run that makes it is complete.

    A path that begins with `lit_puzzle/` and does not exist in the current folder is one of the packaged assets.

    Args:
        path: folder or file that a stage reads.
        purpose: what the stage reads it as, for the message ("parent checkpoint").

    Returns:
        The path to read.

    Raises:
        ValueError: it does not exist, or the run that makes it is incomplete; the message names the command that makes
            it.
    """
    given = path
    if not path.exists() and path.parts[:1] == (PACKAGE.name,):
        path = PACKAGE.joinpath(*path.parts[1:])
    if not path.exists():
        raise ValueError(f"The {purpose} {str(given)!r} does not exist.{_how_to_make(given)}")
    run_folder = next((folder for folder in (path, *path.parents) if (folder / CONFIG).is_file()), None)
    if run_folder is not None and not is_complete(run_folder):
        raise ValueError(f"The {purpose} {str(path)!r} is in a run folder that is not complete.{_how_to_make(given)}")
    return path


def _how_to_make(path: Path) -> str:
    maker = recipe_that_makes(path)
    return f" Make it with: lightning run {maker}" if maker else ""


def open_run(run_dir: Path, config: str, overwrite: bool) -> bool:
    """Claim a run folder for a resolved recipe.

    Args:
        run_dir: the recipe's run folder.
        config: the resolved recipe as YAML text.
        overwrite: whether to remove the run that is there.

    Returns:
        Whether an incomplete run of the same recipe is resumed.

    Raises:
        ValueError: the folder is complete, belongs to a different recipe, or is not a run folder.
    """
    if overwrite and (run_dir / CONFIG).is_file():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"--overwrite cannot be used under torchrun or SLURM: other processes may already read {run_dir}. "
                "Remove the folder first."
            )
        for value in _inputs(yaml.safe_load(config)):
            if run_dir.resolve() in Path(value).resolve().parents and Path(value).exists():
                raise ValueError(
                    f"--overwrite would remove {value}, which this recipe names, with all of {run_dir}. Move it, or "
                    "choose another --run_dir."
                )
        shutil.rmtree(run_dir)
    if run_dir.is_dir() and any(run_dir.iterdir()):
        _check_same_run(run_dir, config)
        return True
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / CONFIG, config)
    return False


def _inputs(value: Any) -> Iterator[str]:
    """Yield every text in a resolved recipe except the folders that Lightning writes to."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            if key not in OUTPUTS:
                yield from _inputs(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from _inputs(inside)


def join_run(run_dir: Path, config: str, patience_seconds: float = 300.0) -> None:
    """Wait, in every process but the first, until the first has claimed the folder for this recipe.

    Raises:
        ValueError: it has not within `patience_seconds`.
    """
    deadline = time.monotonic() + patience_seconds
    while is_complete(run_dir) or not (run_dir / CONFIG).is_file() or (run_dir / CONFIG).read_text() != config:
        if time.monotonic() > deadline:
            raise ValueError(f"{run_dir} was not claimed by the first process within {patience_seconds:.0f} seconds.")
        time.sleep(0.1)


def _check_same_run(run_dir: Path, config: str) -> None:
    if not (run_dir / CONFIG).is_file():
        raise ValueError(f"{run_dir} is not empty and not a run folder (it has no {CONFIG}); choose another --run_dir.")
    before = read_text(run_dir / CONFIG)
    renamed = [] if before == config else renamed_in_config(before)
    if renamed:
        raise ValueError(
            f"{run_dir} was started by an earlier version, in which {len(renamed)} names differ, for example: "
            f"{renamed[0]}. Finish it with that version, choose another --run_dir, or give --overwrite to remove it."
        )
    if before != config:
        texts = before.splitlines(), config.splitlines()
        difference = "\n".join(difflib.unified_diff(*texts, "the run there", "this recipe", n=1, lineterm=""))
        raise ValueError(
            f"{run_dir} was started by a different recipe:\n{difference}\nUndo the change, choose another "
            "--run_dir, or give --overwrite to remove the run that is there."
        )
    if is_complete(run_dir):
        raise ValueError(f"{run_dir} is complete; give --overwrite to run it again, or choose another --run_dir.")


@contextmanager
def abandon_if_empty(run_dir: Path) -> Iterator[None]:
    """Remove a run folder again if the work inside refuses its input before it has written anything."""
    try:
        yield
    except ValueError:
        if {path.name for path in run_dir.iterdir()} == {CONFIG}:
            shutil.rmtree(run_dir)
        raise


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete training checkpoint in `run_dir/checkpoints`, or None.

    A sharded checkpoint (a folder) is complete if it has `meta.pt`; a single file if its zip directory, which is
    written last, is readable.
    """
    found = [path for path in (run_dir / "checkpoints").glob("*.ckpt") if _checkpoint_is_complete(path)]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _checkpoint_is_complete(path: Path) -> bool:
    return (path / "meta.pt").is_file() if path.is_dir() else zipfile.is_zipfile(path)


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
            "command": " ".join(["lightning", *sys.argv[1:]]),
            "git_commit": git_commit(),
            "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "seed": seed,
            "hardware": hardware(),
            "resumed": resumed,
            "seconds": round(time.monotonic() - self.started, 3),
            "cpu_seconds": round(time.process_time(), 3),
            "peak_memory_gib": peak_memory_gib(),
            "results": dict(results),
        }
        write_json(run_dir / RECORD, record, indent=2)


def git_commit() -> str | None:
    """Return the commit of this code, with `+changes` if the tree differs from it; None outside a checkout."""
    command = ["git", "-C", str(PACKAGE), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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
