"""What a run folder says about its run: state, recipe, command, commit, time and hardware, changes, results.

Reads `run.json`, `config.yaml`, `inputs.json` and the lock of a run folder; writes nothing. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_puzzle.report.results_table import number_text, results_text
from lit_puzzle.run.files import read_json, read_yaml, resolved
from lit_puzzle.run.folder import CONFIG, INPUTS_FILE, RECORD
from lit_puzzle.run.lock import working_process
from lit_puzzle.run.marker import MARKER

COMMIT_DIGITS = 12


@dataclass(frozen=True)
class RunSummary:
    """The records of a run.

    Attributes:
        folder: the run folder.
        config: the resolved recipe; empty if the folder has none.
        record: `run.json`; None while the run is incomplete.
        claims: `inputs.json`; empty if the folder has none.
    """

    folder: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any] | None
    claims: Mapping[str, Any]

    @property
    def command(self) -> str:
        """The stage's command."""
        return str(self.config.get("command", "unknown command"))

    @property
    def stage(self) -> str:
        """The stage's command, or the class that Lightning trains or validates."""
        model = self.config.get("model")
        named = str(model.get("class_path", "")) if isinstance(model, Mapping) else ""
        return named.rpartition(".")[2] or self.command

    @property
    def commit(self) -> str:
        """The shortened git commit, with `+changes` if the tree differed from it."""
        commit = (self.record or {}).get("git_commit")
        digits, plus, changes = str(commit or "").partition("+")
        return f"commit {digits[:COMMIT_DIGITS]}{plus}{changes}" if commit else "commit unknown"

    @property
    def state(self) -> str:
        """Whether the run is complete, and what makes it so if not."""
        if self.record is not None:
            return "complete, after a resumption" if self.record.get("resumed") else "complete"
        worker = working_process(self.folder)
        if worker:
            return f"incomplete; at work: {worker}"
        return "incomplete; the command that started it resumes it"

    def root(self) -> Path:
        """Return the folder that the paths in the records are relative to: where the run was started.

        It is found by the recipe's `run_dir`, also after all folders have moved together; else it is the current
        folder.
        """
        run_dir, folder = Path(str(self.config.get("run_dir", ""))), resolved(self.folder)
        parts = run_dir.parts
        if not run_dir.is_absolute() and parts and ".." not in parts and folder.parts[-len(parts) :] == parts:
            return folder.parents[len(parts) - 1]
        return Path.cwd()

    def located(self, path: str) -> Path:
        """Return where a recorded path leads now; one inside this run's folder does so after the folder has moved."""
        run_dir = str(self.config.get("run_dir", ""))
        if run_dir and Path(path).is_relative_to(run_dir):
            return resolved(self.folder / Path(path).relative_to(run_dir))
        return resolved(self.root() / path)


def enclosing_folder(path: Path) -> Path | None:
    """Return the nearest run folder, complete or not, that a path is or lies in."""
    return next((folder for folder in (path, *path.parents) if is_run(folder)), None)


def is_run(folder: Path) -> bool:
    """Return whether a folder has files that only a run writes; a `config.yaml` alone may be anything."""
    return any(
        all((folder / name).is_file() for name in names) for names in ((MARKER,), (INPUTS_FILE,), (CONFIG, RECORD))
    )


def read_run(folder: Path) -> RunSummary:
    """Read the records of a run folder.

    Raises:
        ValueError: it is not a run folder, or a record is damaged.
    """
    if not is_run(folder):
        raise ValueError(_not_a_run(folder))
    config = read_yaml(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else None
    claims = read_json(folder / INPUTS_FILE) if (folder / INPUTS_FILE).is_file() else {}
    _check_kind(folder / CONFIG, "", config, dict)
    for key in ("hardware", "results", "peak_memory_gib"):
        _check_kind(folder / RECORD, key, (record or {}).get(key, {}), dict)
    _check_kind(folder / RECORD, "hardware.gpus", (record or {}).get("hardware", {}).get("gpus", []), list)
    changes = claims.get("changes", [])
    _check_kind(folder / INPUTS_FILE, "changes", changes, list)
    for index, change in enumerate(changes):
        _check_kind(folder / INPUTS_FILE, f"changes.{index}", change, dict)
    return RunSummary(folder, config, record, claims)


def _check_kind(file: Path, key: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        what = f"{key} is" if key else "it holds"
        raise ValueError(f"{file} is damaged: {what} {str(value)[:60]!r}, no {kind.__name__}. Restore the file.")


def _not_a_run(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist."
    enclosing = enclosing_folder(resolved(folder))
    if enclosing is not None:
        return f"{folder} is not a run folder, but lies in one: lightning show {enclosing}"
    inside = sorted(path.name for path in folder.iterdir() if is_run(path)) if folder.is_dir() else []
    if inside:
        return f"{folder} is not a run folder, but contains some: {', '.join(inside)}. Name one of them."
    signs = f"neither {MARKER} nor {INPUTS_FILE}, nor {CONFIG} and {RECORD}"
    return f"{folder} is not a run folder: it has {signs}. `lightning run` makes such folders."


def head_lines(run: RunSummary) -> list[str]:
    """Return the lines about the run itself: state, recipe, command, commit with time and hardware.

    An incomplete run has no record yet: its lines are the stage and the newest training checkpoint.
    """
    record = run.record or {}
    lines = [f"{run.folder}: {run.state}"]
    if record:
        lines += [f"  recipe   {record.get('recipe')}", f"  command  {record.get('command')}"]
    if not record:
        lines.append(f"  stage    {run.command}")
        saved = sorted((run.folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        lines += [f"  reached  checkpoints/{path.name}" for path in saved[-1:]]
    details = [run.commit, *_costs(record)] if record else []
    details += [f"seed {record['seed']}"] if record.get("seed") is not None else []
    details += [f"date {run.claims['date']}"] if "date" in run.claims else []
    return [*lines, f"  {', '.join(details)}"] if details else lines


def _costs(record: Mapping[str, Any]) -> list[str]:
    """Return seconds, peak memory and hardware as short texts."""
    hardware, peak = record.get("hardware", {}), record.get("peak_memory_gib", {})
    gpus = [str(name) for name in hardware.get("gpus", [])]
    names = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "no GPU"
    memory = [f"{number_text(value)} GiB ({device})" for device, value in peak.items()]
    machine = f"{hardware.get('machine', 'unknown machine')} with {hardware.get('cpu_cores', '?')} cores, {names}"
    return [f"{number_text(record.get('seconds'))} s", *memory, machine]


def change_lines(run: RunSummary) -> list[str]:
    """Return the keys of the recipe that were changed on resume, a line each; none: no line."""
    changes = run.claims.get("changes", [])
    lines = [f"  {change.get('key')}: {change.get('before')} -> {change.get('now')}" for change in changes]
    return ["", "changes on resume", *lines] if lines else []


def result_lines(run: RunSummary) -> list[str]:
    """Return the results, each with its standard error if there is one."""
    results: Mapping[str, Any] = (run.record or {}).get("results", {})
    if not results:
        return ["", "results: none" + ("" if run.record else " yet")]
    return ["", "results", *(f"  {line}" for line in results_text(results))]
