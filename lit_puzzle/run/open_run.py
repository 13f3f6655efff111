"""How a command takes a run folder: fresh, resumed, overwritten, or refused.

Writes `inputs.json` (with the date) and `config.yaml` into a fresh folder; reads what an earlier attempt left.
"""

import difflib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lit_puzzle.run.files import write_atomically
from lit_puzzle.run.folder import CONFIG, is_complete
from lit_puzzle.run.inputs import INPUTS_FILE, run_date
from lit_puzzle.run.renamed import renamed_in_config

OUTPUTS = ("dirpath", "save_dir", "default_root_dir")  # Lightning's names of folders to write


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
    run_date(run_dir)  # before config.yaml, for which other processes wait
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
    before = (run_dir / CONFIG).read_text()
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
        if {path.name for path in run_dir.iterdir()} <= {CONFIG, INPUTS_FILE}:
            shutil.rmtree(run_dir)
        raise
