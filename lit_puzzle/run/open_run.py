"""How a command takes a run folder: fresh, resumed, overwritten, or refused.

Writes the marker, `inputs.json` (with the date) and `config.yaml` into a fresh folder, in this order; reads what an
earlier attempt left. A folder without results never refuses a command: an attempt that was stopped before its first
result starts anew.
"""

import errno
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lit_puzzle.run.config_changes import Change, compare_configs
from lit_puzzle.run.files import parse_yaml, read_text, read_yaml, resolved, write_atomically
from lit_puzzle.run.folder import CONFIG, INPUTS_FILE, is_complete
from lit_puzzle.run.inputs import forget_inputs, record_changes, recorded_inputs, run_date
from lit_puzzle.run.lock import LOCK_FILE, TAKEN_FILE, locked
from lit_puzzle.run.marker import (
    BOOKKEEPING,
    DERIVED,
    LOGS,
    MARKER,
    check_removable,
    has_results,
    is_run_folder,
    is_unclaimed,
    noted_before,
    noted_files,
    remove_contents,
    remove_temporary,
    write_marker,
)
from lit_puzzle.run.renamed import renamed_in_config

DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
DISK_WORDS = (  # of libraries that write by themselves
    *("No space left", "File too large", "quota exceeded", "Read-only file system"),
    *("file write failed", "unexpected pos"),  # torch.save
)
OUTPUTS = ("dirpath", "save_dir", "default_root_dir")  # Lightning's names of folders to write


@contextmanager
def opened_run(run_dir: Path, config: str, overwrite: bool, notes_all: bool = False) -> Iterator[bool]:
    """Take a run folder for the work inside; the first process only.

    The folder is locked until the end. If the work refuses its input before it has a result, the folder disappears.

    Args:
        run_dir: the recipe's run folder.
        config: the resolved recipe as YAML text.
        overwrite: whether to remove the run that is there.
        notes_all: whether code of the user may write into the folder, under any names.

    Yields:
        Whether an incomplete run of the same recipe is resumed.

    Raises:
        ValueError: the folder is in use, complete, of a different recipe, or not a run folder.
    """
    _check_own(run_dir)
    is_new = not run_dir.exists()
    try:
        with locked(run_dir), abandoned_if_empty(run_dir), write_errors(run_dir):
            resumed = open_run(run_dir, config, overwrite)
            with noted_files(run_dir, notes_all):
                yield resumed
    finally:
        if is_new and run_dir.is_dir() and not any(run_dir.iterdir()):
            run_dir.rmdir()  # abandoned, and now without its lock


def open_run(run_dir: Path, config: str, overwrite: bool) -> bool:
    """Claim a run folder, whose lock is held, for a resolved recipe; see `opened_run`."""
    _check_own(run_dir)
    if overwrite and not is_unclaimed(run_dir):
        _check_overwrite(run_dir, config)
        remove_contents(run_dir)
    remove_temporary(run_dir)
    if not is_unclaimed(run_dir):
        if has_results(run_dir) or is_complete(run_dir):
            _resume(run_dir, config)
            return True
        spared = {LOCK_FILE, TAKEN_FILE, MARKER, *LOGS, *DERIVED}
        if (run_dir / CONFIG).is_file() and read_text(run_dir / CONFIG) == config:
            spared |= {CONFIG, INPUTS_FILE}  # other processes may have read them already
            forget_inputs(run_dir)
        remove_contents(run_dir, spared)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_marker(run_dir, files=noted_before(run_dir))
    run_date(run_dir)  # before config.yaml, for which other processes wait
    write_atomically(run_dir / CONFIG, config)
    return False


def _check_own(run_dir: Path) -> None:
    try:
        is_there = run_dir.exists()
    except OSError as error:  # a name that is too long, or a folder above that is closed
        raise ValueError(f"{run_dir} cannot be a run folder: {error.strerror}. Choose another --run_dir.") from error
    if is_there and not run_dir.is_dir():
        raise ValueError(f"{run_dir} is a file, not a folder; choose another --run_dir.")
    if is_unclaimed(run_dir) or is_run_folder(run_dir):
        return
    if (run_dir / CONFIG).is_file():
        _check_version(run_dir)
    what = "not a run folder of this version" if (run_dir / CONFIG).is_file() else "not a run folder"
    raise ValueError(
        f"{run_dir} is not empty and {what} (it has no {MARKER}), so that it is left alone. Choose another --run_dir."
    )


def _check_version(run_dir: Path) -> None:
    """Refuse the recipe of an earlier version, whose names differ."""
    try:
        renamed = renamed_in_config(read_text(run_dir / CONFIG))
    except ValueError:  # a file of somebody else
        return
    if renamed:
        raise ValueError(
            f"{run_dir} was started by an earlier version, in which {len(renamed)} names differ, for example: "
            f"{renamed[0]}. Finish it with that version, or choose another --run_dir."
        )


def _check_overwrite(run_dir: Path, config: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"--overwrite cannot be used under torchrun or SLURM: other processes may already read {run_dir}. "
            "Remove the folder first."
        )
    for value in _inputs(parse_yaml(config, CONFIG)):
        if resolved(run_dir) in resolved(Path(value)).parents and Path(value).exists():
            raise ValueError(
                f"--overwrite would remove {value}, which this recipe names, with all of {run_dir}. Move it, or "
                "choose another --run_dir."
            )
    check_removable(run_dir)


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


def _resume(run_dir: Path, config: str) -> None:
    """Check that a run with results is of this recipe, and record changes that are allowed."""
    if not (run_dir / CONFIG).is_file():
        raise ValueError(f"{run_dir} has results, but no {CONFIG}; give --overwrite to start anew.")
    before, changes = read_text(run_dir / CONFIG), list[Change]()
    if before != config:
        _check_version(run_dir)
        recorded = read_yaml(run_dir / CONFIG)
        if not isinstance(recorded, Mapping):
            raise ValueError(f"{run_dir / CONFIG} has no recipe. Restore the file, or give --overwrite to start anew.")
        inputs = {identity.path for identity in recorded_inputs(run_dir).values()}
        difference, changes = compare_configs(recorded, parse_yaml(config, "this recipe"), inputs)
        if difference:
            raise ValueError(
                f"{run_dir} was started by a different recipe:\n{difference}\nUndo the change, choose another "
                "--run_dir, or give --overwrite to remove the run that is there."
            )
    named = ", ".join(f"{change.key}: {change.before} -> {change.now}" for change in changes[:3])
    if is_complete(run_dir):
        what = f"complete, made with other keys ({named})" if changes else "complete"
        raise ValueError(f"{run_dir} is {what}; give --overwrite to run it again, or choose another --run_dir.")
    if not (run_dir / INPUTS_FILE).is_file():
        raise ValueError(
            f"{run_dir} has results, but no {INPUTS_FILE}, which says of what; restore it, or give --overwrite to "
            "start anew."
        )
    if before != config:
        record_changes(run_dir, [vars(change) for change in changes])
        write_atomically(run_dir / CONFIG, config)
        print(f"resuming {run_dir} with {len(changes)} changed keys: {named}", flush=True)


@contextmanager
def abandoned_if_empty(run_dir: Path) -> Iterator[None]:
    """Empty a run folder again if the work inside refuses its input before it has a result."""
    try:
        yield
    except ValueError:
        if {path.name for path in run_dir.iterdir() if not _is_empty(path)} <= BOOKKEEPING | LOGS and not is_complete(
            run_dir
        ):
            remove_contents(run_dir)
        raise


@contextmanager
def write_errors(run_dir: Path) -> Iterator[None]:
    """Turn errors of a full or read-only disk into one error of the user; what was finished stays.

    Raises:
        ValueError: the disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        refused = _refused_write(error)
        if refused is None and not any(words in str(error) for words in DISK_WORDS):
            raise
        file = refused.filename if refused and refused.filename else run_dir
        said = " ".join(str(error).split())[:200]
        guess = f"{said} (probably {os.strerror(errno.ENOSPC)})"  # torch.save gives no reason
        reason = refused.strerror if refused else guess if "unexpected pos" in said else said
        raise ValueError(f"{file} cannot be written: {reason}. Make room; the same command continues.") from error


def _refused_write(error: BaseException | None) -> OSError | None:
    """Return the error of a disk among an error and those before it: `torch.save` raises one of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        error = error.__cause__ or error.__context__
    return None


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(inside.is_file() for inside in path.rglob("*"))
