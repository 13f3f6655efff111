"""How a pipeline takes its folder: fresh, gone on with, overwritten, or refused.

Writes the marker, the date and `config.yaml`, which stays as it was if the pipeline is refused before a stage starts.
Unlike the folder of a stage it is not refused when it is complete or its recipe has changed: what is complete and
unchanged is decided stage by stage. `--overwrite` removes what its stages have
made, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_puzzle.pipeline.notes import NOTES_FILE
from lit_puzzle.pipeline.stages import read_stages
from lit_puzzle.run.commands import PIPELINE
from lit_puzzle.run.files import parse_yaml, read_yaml, write_atomically
from lit_puzzle.run.folder import CONFIG
from lit_puzzle.run.inputs import run_date
from lit_puzzle.run.lock import locked, working_process
from lit_puzzle.run.marker import (
    BOOKKEEPING,
    MARKER,
    check_removable,
    is_run_folder,
    is_unclaimed,
    remove_contents,
    remove_temporary,
    write_marker,
)
from lit_puzzle.run.open_run import abandoned_if_empty, write_errors


@contextmanager
def opened_pipeline(run_dir: Path, config: str, overwrite: bool) -> Iterator[bool]:
    """Take the folder of a pipeline for the work inside; it is locked until the end.

    Args:
        run_dir: the folder.
        config: the resolved recipe as YAML text.
        overwrite: whether to remove what its stages have made.

    Yields:
        Whether a pipeline was there.

    Raises:
        ValueError: the folder is in use, or not one of a pipeline; or what would be removed was not made by it.
    """
    _check_pipeline(run_dir)
    if overwrite:  # what is wrong with the recipe, before anything is removed
        content = parse_yaml(config, CONFIG)
        read_stages(run_dir, content["stages"], content.get("overrides") or {})
    is_new = not run_dir.exists()
    try:
        with locked(run_dir), abandoned_if_empty(run_dir), write_errors(run_dir):
            _check_pipeline(run_dir)
            if overwrite and not is_unclaimed(run_dir):
                _remove_stages(run_dir)
            remove_temporary(run_dir)
            was_there = not is_unclaimed(run_dir)
            write_marker(run_dir, files=_own_files(run_dir))
            run_date(run_dir)
            try:
                with _config_replaced(run_dir, config):
                    yield was_there
            finally:
                write_marker(run_dir, files=_own_files(run_dir))
    finally:
        if is_new and run_dir.is_dir() and not any(run_dir.iterdir()):
            run_dir.rmdir()  # refused at its start, and now without its lock


@contextmanager
def _config_replaced(run_dir: Path, config: str) -> Iterator[None]:
    """Write `config.yaml`; put the earlier one back if the work inside refuses its input before a stage starts."""
    before, notes = (_content(run_dir / name) for name in (CONFIG, NOTES_FILE))
    write_atomically(run_dir / CONFIG, config)
    try:
        yield
    except ValueError:
        if before is not None and _content(run_dir / NOTES_FILE) == notes:
            write_atomically(run_dir / CONFIG, before)
        raise


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _own_files(run_dir: Path) -> list[str]:
    return [path.name for path in run_dir.iterdir() if path.name == NOTES_FILE or path.suffix == ".log"]


def _check_pipeline(run_dir: Path) -> None:
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir} is a file, not a folder; choose another --run_dir.")
    if is_unclaimed(run_dir):
        return
    if not is_run_folder(run_dir):
        raise ValueError(
            f"{run_dir} is not empty and not a run folder (it has no {MARKER}), so that it is left alone. Choose "
            "another --run_dir."
        )
    if not (run_dir / CONFIG).is_file():
        return
    recipe = read_yaml(run_dir / CONFIG)
    command = recipe.get("command") if isinstance(recipe, dict) else None
    if command != PIPELINE:
        raise ValueError(f"{run_dir} holds a run of {command!r}, not a pipeline. Choose another --run_dir.")


def _remove_stages(run_dir: Path) -> None:
    """Remove the run folders of stages, the logs and the notes, after a check that all of it was made by runs."""
    folders = [path for path in run_dir.iterdir() if path.is_dir() and not path.is_symlink() and is_run_folder(path)]
    known = {*BOOKKEEPING, *_own_files(run_dir), *(folder.name for folder in folders)}
    foreign = sorted(path.name for path in run_dir.iterdir() if path.name not in known)
    if foreign:
        raise ValueError(
            f"{run_dir} contains {', '.join(foreign[:5])}, which no stage has made. Move that away, or choose another "
            "--run_dir."
        )
    for folder in folders:
        worker = working_process(folder)
        if worker:
            raise ValueError(f"{folder} is in use by {worker}. Wait for it, or stop it.")
        check_removable(folder)
    for folder in folders:
        remove_contents(folder, ())
        folder.rmdir()
    remove_contents(run_dir)
