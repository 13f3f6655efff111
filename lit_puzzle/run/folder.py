"""Run folders: one per recipe, complete when it contains `run.json`.

A run writes `config.yaml` (the resolved recipe, first) and `run.json` (last, atomically). Between the two the folder is
incomplete, and the same command resumes it. How a command takes a folder: `lit_puzzle.run.open_run`.
"""

import zipfile
from pathlib import Path

from lit_puzzle.run.recipe import recipe_that_makes

PACKAGE = Path(__file__).parents[1]
CONFIG, RECORD = "config.yaml", "run.json"
INPUTS_FILE, OUTPUTS_FILE = "inputs.json", "outputs.json"  # `lit_puzzle.run.inputs` writes them
ROWS = (".json", ".jsonl", ".parquet")  # formats that outputs have, or had


def is_complete(folder: Path) -> bool:
    """Return whether a run folder is complete."""
    return (folder / RECORD).is_file()


def require_input(path: Path, purpose: str, holds: str | tuple[str, ...] = ()) -> Path:
    """Check that an input of a stage exists and that the run that makes it is complete.

    A path that begins with `lit_puzzle/` and does not exist in the current folder is one of the packaged assets.

    Args:
        path: folder or file that a stage reads.
        purpose: what the stage reads it as, for the message ("parent checkpoint").
        holds: file that the folder has, or several of which it has one: the path may then also be this file, or a run
            folder with one folder that has it.

    Returns:
        The path to read: the folder that has the file, if `holds` names one.

    Raises:
        ValueError: it does not exist, a folder has none of the files, or the run that makes it is incomplete; the
            message names the command that makes it.
    """
    given = path
    if not path.exists() and path.parts[:1] == (PACKAGE.name,):
        path = PACKAGE.joinpath(*path.parts[1:])
    if not path.exists():
        run = next((folder for folder in path.parents if (folder / CONFIG).is_file() and not is_complete(folder)), None)
        yet = "" if run is None else f" yet: the run in {str(run)!r} is not complete"
        raise ValueError(f"The {purpose} {str(given)!r} does not exist{yet}.{_how_to_make(given)}")
    path = _folder_with((holds,) if isinstance(holds, str) else holds, path, purpose)
    run_folder = next((folder for folder in (path, *path.parents) if (folder / CONFIG).is_file()), None)
    if run_folder is not None and not is_complete(run_folder):
        raise ValueError(f"The {purpose} {str(path)!r} is in a run folder that is not complete.{_how_to_make(given)}")
    return path


def require_file(path: Path, purpose: str, name: str) -> Path:
    """Return a file that a stage reads, given by its path or by the run folder that has it; see `require_input`."""
    found = require_input(path, purpose, name)
    return found / name if found.is_dir() and (found / name).is_file() else found


def _folder_with(names: tuple[str, ...], path: Path, purpose: str) -> Path:
    if path.is_file() and path.name in names:
        return path.parent
    if not path.is_dir() or any((path / name).is_file() for name in names):
        return path
    found = sorted({file.parent for name in names for file in path.glob(f"*/{name}") if file.is_file()})
    if len(found) > 1:
        raise ValueError(f"The {purpose} {str(path)!r} may be {', '.join(map(str, found))}; name one of them.")
    if names and not found:
        holds = f"holds no {' or '.join(names)}{_of_older_version(names, path)}"
        raise ValueError(f"The {purpose} {str(path)!r} {holds}.{_how_to_make(path)}")
    return found[0] if found else path


def _of_older_version(names: tuple[str, ...], path: Path) -> str:
    """Say what a complete run folder has in place of a file: rows were in other formats once."""
    if not is_complete(path):
        return ""
    stems = {Path(name).stem for name in names}
    found = sorted(file.name for file in path.iterdir() if file.stem in stems and file.suffix in ROWS)
    return f", only {' and '.join(found)} of an older version: run the stage again" if found else ""


def _how_to_make(path: Path) -> str:
    maker = recipe_that_makes(path)
    return f" Make it with: lightning run {maker}" if maker else ""


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete training checkpoint in `run_dir/checkpoints`, or None.

    A sharded checkpoint (a folder) is complete if it has `meta.pt`; a single file if its zip directory, which is
    written last, is readable.
    """
    found = [path for path in (run_dir / "checkpoints").glob("*.ckpt") if _checkpoint_is_complete(path)]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _checkpoint_is_complete(path: Path) -> bool:
    return (path / "meta.pt").is_file() if path.is_dir() else zipfile.is_zipfile(path)
