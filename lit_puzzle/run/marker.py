"""The marker of a run folder: only what this tool has made is ever removed.

Writes `.lit_puzzle_run` into a fresh run folder: format, version, whether an attempt is running, and the files that the
run has made, noted at the end of every attempt. `--overwrite` removes these only; after an attempt that was killed, and
so could note nothing, also what stages are known to write. Anything else was put there by somebody else.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lit_puzzle import __version__
from lit_puzzle.run.files import read_json, write_json
from lit_puzzle.run.folder import CONFIG, INPUTS_FILE, OUTPUTS_FILE, RECORD
from lit_puzzle.run.lock import LOCK_FILE, TAKEN_FILE

MARKER = ".lit_puzzle_run"
FORMAT = 1
BOOKKEEPING = frozenset({MARKER, LOCK_FILE, TAKEN_FILE, CONFIG, RECORD, INPUTS_FILE, OUTPUTS_FILE})
LOGS = frozenset({"logs", "lightning_logs", "wandb", "mlruns"})
DERIVED = frozenset({"packed"})  # found to fit, or made again, by whoever reads it
REMADE = frozenset(  # made again by every attempt
    {"calibration.jsonl", "calibration_tokens", "kv_calibration", "generation_lengths.json"}
)
TEMPORARY = re.compile(r"\.(.+)\.(\d+|partial|old)")  # of atomic writing: .NAME.PROCESS, and of folders and shards
WRITTEN = (  # by stages
    *("checkpoints", "best", "before", "after", "rollouts", "child", "model", "sweep", "pictures"),
    *("library", "documents", "top_logits", "packed", "calibration_tokens"),
    *("candidates", "evaluations", "progress", "kv_calibration", "kv_scales"),
    *("hidden_states.*", "layers.*", "broken_batch_*.pt"),
    *("calibration.jsonl", "episodes.*", "generation_lengths.json", "importance.*", "kv_scales.*", "scores.json"),
    *(
        "library.json",
        "plan.*",
        "curve.*",
        "search.md",
        "report.json",
        "report.html",
        "frontier.json",
        "throughput.json",
        "job.json",
        "results.json",
        "*.log",
        "*.partial",
    ),
)


def write_marker(run_dir: Path, is_running: bool = False, files: Iterable[str] = ()) -> None:
    """Mark a folder as a run folder.

    Args:
        run_dir: the folder.
        is_running: whether an attempt is running, which has not noted its files yet.
        files: files in it that the run has made.
    """
    content = {"format": FORMAT, "version": __version__, "running": is_running}
    write_json(run_dir / MARKER, content | {"files": sorted(files)})


@contextmanager
def noted_files(run_dir: Path, notes_all: bool) -> Iterator[None]:
    """Note at the end of an attempt, however it ends, the new files in the run folder as made by the run.

    Args:
        run_dir: the folder.
        notes_all: whether code of the user writes there; else only files with names that stages give are noted.
    """
    before = _files(run_dir)
    write_marker(run_dir, True, _noted(run_dir))
    try:
        yield
    finally:
        new = {name for name in _files(run_dir) - before if notes_all or _is_of_a_stage(name)}
        with suppress(ValueError):  # a full disk: the attempt has an error of its own
            write_marker(run_dir, False, new | _noted(run_dir))


def _files(run_dir: Path) -> set[str]:
    found = (path for path in run_dir.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(run_dir).as_posix() for path in found}


def _noted(run_dir: Path) -> set[str]:
    return set(_read(run_dir)["files"])


def _read(run_dir: Path) -> dict[str, Any]:
    """Return the content of the marker.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    file, remedy = run_dir / MARKER, f"Remove {run_dir} yourself, or choose another --run_dir."
    try:
        content = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}. {remedy}") from error
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {str(content.get('format'))[:20]}, this version reads {FORMAT}. Finish the run with "
            f"version {str(content.get('version'))[:20]} of lit_puzzle, or choose another --run_dir."
        )
    files = content.get("files")
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ValueError(f"{file} is damaged: files must be a list of names, got {str(files)[:60]}. {remedy}")
    return content


def noted_before(run_dir: Path) -> set[str]:
    """Return the noted files that are still there, of a run that starts anew."""
    return _noted(run_dir) & _files(run_dir) if is_run_folder(run_dir) else set()


def _is_of_a_stage(name: str) -> bool:
    top = name.partition("/")[0]
    return top in LOGS or any(fnmatch(top, pattern) for pattern in WRITTEN)


def is_run_folder(run_dir: Path) -> bool:
    """Return whether a folder has the marker."""
    return (run_dir / MARKER).is_file()


def is_unclaimed(run_dir: Path) -> bool:
    """Return whether a folder does not exist, or has nothing but what an attempt killed at its very start leaves."""
    if not run_dir.exists():
        return True
    return run_dir.is_dir() and all(
        _is_temporary(path) or path.name in (LOCK_FILE, TAKEN_FILE) for path in run_dir.iterdir()
    )


def has_results(run_dir: Path) -> bool:
    """Return whether a run has written more than bookkeeping, logs and files that can be made again."""
    nothing = BOOKKEEPING | LOGS | DERIVED | REMADE
    return any(not _is_temporary(path) and path.name not in nothing and _has_files(path) for path in run_dir.iterdir())


def _has_files(path: Path) -> bool:
    return not path.is_dir() or path.is_symlink() or any(not inside.is_dir() for inside in path.rglob("*"))


def check_removable(run_dir: Path) -> None:
    """Check that everything in a run folder was made by the run.

    Raises:
        ValueError: it has no marker, or contains files of others or another run; names them.
    """
    if not is_run_folder(run_dir):
        raise ValueError(
            f"{run_dir} has no {MARKER}: it is not a run folder of this version, so that --overwrite leaves it alone. "
            "Remove it yourself, or choose another --run_dir."
        )
    noted, was_killed = _noted(run_dir), bool(_read(run_dir).get("running"))
    foreign = [
        name
        for name in sorted(_files(run_dir) - noted - BOOKKEEPING)
        if not any(TEMPORARY.fullmatch(part) for part in name.split("/")) and not (was_killed and _is_of_a_stage(name))
    ]
    nested = [str(path.parent.relative_to(run_dir)) for path in run_dir.rglob(MARKER) if path.parent != run_dir]
    if foreign or nested:
        what = [f"the run in {name}" for name in nested]
        what += [name for name in foreign if not any(name.startswith(f"{run}/") for run in nested)]
        raise ValueError(
            f"{run_dir} contains {', '.join(what[:5])}{' and more' if len(what) > 5 else ''}, which this run has not "
            "made. Move that away, or choose another --run_dir."
        )


def remove_contents(run_dir: Path, spare: Iterable[str] = (LOCK_FILE, TAKEN_FILE)) -> None:
    """Remove what is in a folder, links but not what they point to."""
    for path in list(run_dir.iterdir()):
        if path.name in spare:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_temporary(run_dir: Path) -> None:
    """Remove the temporary files of processes that are no longer there (the lock of the folder is held).

    In a folder without marker these are the ones of bookkeeping only: nothing else was written before the marker.
    """
    is_marked = is_run_folder(run_dir)
    for path in run_dir.rglob(".*"):
        match = TEMPORARY.fullmatch(path.name)
        is_ours = match is not None and (is_marked or match[1] in BOOKKEEPING)
        if match and is_ours and match[2].isdigit() and path.is_file() and not _is_running(int(match[2])):
            path.unlink(missing_ok=True)


def _is_temporary(path: Path) -> bool:
    return TEMPORARY.fullmatch(path.name) is not None


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
