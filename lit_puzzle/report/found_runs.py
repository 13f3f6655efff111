"""The runs that a report is about: complete runs in folders, newest first, and what was left out and why.

Reads the records of run folders; writes nothing. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lit_puzzle.report.run_summary import RunSummary, is_run, read_run
from lit_puzzle.run.commands import PIPELINE
from lit_puzzle.run.files import read_yaml, resolved
from lit_puzzle.run.folder import CONFIG, RECORD

DEPTH = 3  # of folders in folders: a pipeline's stages, its seeds
DAMAGED = (
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    OSError,
)  # changed by hand, other versions


@dataclass(frozen=True)
class FoundRuns:
    """Runs in folders.

    Attributes:
        complete: complete runs, the one that ended last first.
        left_out: folder of a run that is not complete or damaged -> why it takes no part.
    """

    complete: tuple[RunSummary, ...]
    left_out: dict[Path, str]

    def having(self, *files: str) -> list[RunSummary]:
        """Return the complete runs whose folder has one of these files, newest first."""
        return [run for run in self.complete if any((run.folder / file).is_file() for file in files)]

    def of(self, *commands: str) -> list[RunSummary]:
        """Return the complete runs of these commands, newest first."""
        return [run for run in self.complete if run.command in commands]


def find_runs(folders: Sequence[Path], own: Path) -> FoundRuns:
    """Find the runs in folders.

    Args:
        folders: run folders, folders of pipelines, or folders that contain some, at most three levels below.
        own: run folder of the report, which is none of them.

    Raises:
        ValueError: a folder does not exist, or no complete run is in any.
    """
    found: dict[Path, RunSummary] = {}
    left_out: dict[Path, str] = {}
    ended: dict[Path, tuple[float, int]] = {}
    for folder in dict.fromkeys(path for given in folders for path in _runs_in(given)):
        if resolved(folder) == resolved(own):
            continue
        try:
            run = read_run(folder)
            ended[folder] = _ended(run)
        except (ValueError, OSError) as error:
            left_out[folder] = f"its records cannot be read: {error}"
            continue
        if run.record is None:
            left_out[folder] = run.state
        elif resolved(folder) not in {resolved(path) for path in found}:
            found[folder] = run
    if not found:
        why = "".join(f" {folder}: {reason}." for folder, reason in left_out.items())
        names = ", ".join(map(str, folders)) or "no folder"
        raise ValueError(f"No complete run is in {names}; name folders of runs, such as runs.{why}")
    newest = sorted(found.values(), key=lambda run: ended[run.folder], reverse=True)
    return FoundRuns(tuple(newest), left_out)


def files_in(folders: Sequence[Path], pattern: str) -> list[Path]:
    """Return the files of a name in folders and at most three levels below, of complete runs or not."""
    patterns = ["*/" * depth + pattern for depth in range(DEPTH + 1)]
    return [file for folder in folders for each in patterns for file in folder.glob(each) if file.is_file()]


def _ended(run: RunSummary) -> tuple[float, int]:
    """Return when a run ended, in s, by its record or, in one without `ended`, by the file's time; then that, in ns."""
    if run.record is None:
        return 0, 0
    written_ns = (run.folder / RECORD).stat().st_mtime_ns
    if "ended" not in run.record:
        return written_ns / 1e9, written_ns
    return datetime.fromisoformat(str(run.record["ended"])).timestamp(), written_ns


def _runs_in(folder: Path, depth: int = DEPTH) -> Iterable[Path]:
    """Return a run folder itself, or the run folders in it, by name."""
    if not folder.is_dir():
        raise ValueError(f"{folder} was given in `folders`; it is no folder. Name folders of runs, such as runs.")
    if is_run(folder) and not _is_pipeline(folder):
        yield folder
    elif depth:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                yield from _runs_in(path, depth - 1)


def _is_pipeline(folder: Path) -> bool:
    """Return whether a folder holds the run folders of a pipeline's stages."""
    file = folder / CONFIG
    try:
        content = read_yaml(file) if file.is_file() else None
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("command") == PIPELINE


def choice_text(runs: Sequence[RunSummary]) -> list[str]:
    """Return a sentence about runs that could have been drawn as well; none if there is one run only."""
    others = ", ".join(str(run.folder) for run in runs[1:])
    if not others:
        return []
    return [f"{len(runs)} such runs are there; shown is the newest, {runs[0].folder}. The others: {others}."]
