"""Inputs and outputs of a run: what it was started with, by content, so that nothing else takes its place.

Reads and writes in a run folder: `inputs.json`, the date and every input of the run (`lit_puzzle.run.identity`),
written before anything slow; `outputs.json`, what the run has made, which `run.json` takes over. Needs no torch.

    {"format": 1, "date": "2026-01-31",
     "inputs": {"parent": {"path": "parents/20b", "content": {"weights": "5d1c...", "tokenizer": "...", ...}}}}

A resumed run compares contents; where an input lies does not matter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lit_puzzle.run.files import read_json, to_json, write_json
from lit_puzzle.run.folder import INPUTS_FILE, OUTPUTS_FILE, RECORD
from lit_puzzle.run.identity import Identity

FORMAT = 1
SHOWN = 12  # digits of a hash in messages


@runtime_checkable
class ReadsInputs(Protocol):
    """A module, data module or callback with inputs, which the run claims before it trains or validates."""

    def input_identities(self) -> Mapping[str, Identity]:
        """Return the identity of every input by its name."""
        ...


def claim_inputs(run_dir: Path, inputs: Mapping[str, Identity]) -> None:
    """Record the inputs of a run, or check that a resumed run has the same; the first process only.

    An input of a name that is not recorded yet is added, so that a stage may claim in several steps.

    Args:
        run_dir: the run folder.
        inputs: name -> identity of each input.

    Raises:
        ValueError: an input is not the one that the run was started with; names it, its path and the parts of its
            content that differ.
    """
    run_date(run_dir)
    record = _read(run_dir / INPUTS_FILE)
    known = _identities(run_dir / INPUTS_FILE, record["inputs"])
    for name, now in inputs.items():
        if name in known:
            _check_same(run_dir, name, known[name], now)
    merged = known | dict(inputs)
    if merged != known:
        record["inputs"] = {name: identity.to_json() for name, identity in merged.items()}
        write_json(run_dir / INPUTS_FILE, record)


def forget_inputs(run_dir: Path) -> None:
    """Forget the inputs of an attempt without results; its date holds."""
    if (run_dir / INPUTS_FILE).is_file():
        record = _read(run_dir / INPUTS_FILE)
        write_json(run_dir / INPUTS_FILE, {"format": FORMAT, "date": record["date"], "inputs": {}})


def record_changes(run_dir: Path, changes: list[dict[str, Any]]) -> None:
    """Note keys of the recipe that a resumed run has changed: `key`, `before` and `now` of each."""
    record = _read(run_dir / INPUTS_FILE)
    record["changes"] = [*record.get("changes", []), *changes]
    write_json(run_dir / INPUTS_FILE, record)


def _check_same(run_dir: Path, name: str, before: Identity, now: Identity) -> None:
    differing = dict(before.content.items() ^ now.content.items())
    if differing:
        said = ", ".join(f"{part} {_part(now, part)} instead of {_part(before, part)}" for part in sorted(differing))
        where = "" if before.path == now.path else f" (then {before.path})"
        raise ValueError(
            f"{run_dir} was started with another {name}: {now.path}{where} has {said}. Put the former back, choose "
            "another --run_dir, or give --overwrite to start anew."
        )


def _part(identity: Identity, part: str) -> str:
    return identity.content.get(part, "none")[:SHOWN]


_given_dates: list[str | None] = [None]  # by the recipes that are running


@contextmanager
def dated(day: str | None) -> Iterator[None]:
    """Give the runs inside a date: the key `chat_date` of a recipe; None: that of the day on which they start.

    Raises:
        ValueError: it is no ISO date.
    """
    if day is not None:
        try:
            date.fromisoformat(day)
        except ValueError as error:
            raise ValueError(f"chat_date is {day!r}; an ISO date is needed, such as 2026-01-31.") from error
    _given_dates.append(day)
    try:
        yield
    finally:
        _given_dates.pop()


def run_date(run_dir: Path) -> str:
    """Return the date of a run, which a chat template that reads the clock is given, as an ISO text.

    The date is that of the recipe, or else of the first call, and is recorded: a resumed run asks the same prompts.
    Every process may call it.

    Raises:
        ValueError: `inputs.json` is damaged.
    """
    file = run_dir / INPUTS_FILE
    if not file.is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        day = _given_dates[-1] or date.today().isoformat()
        content = {"format": FORMAT, "date": day, "inputs": {}}
        _create_once(file, to_json(content) + "\n")
    return str(_read(file)["date"])


def take_date(run_dir: Path, other: Path) -> str:
    """Give a run the date of another one, with which it is compared, unless it has claimed inputs already.

    Args:
        run_dir: folder of this run.
        other: folder of the other run.

    Returns:
        The date of this run, which differs from the other's where it was started before, or its recipe gives one.
    """
    own, taken = run_date(run_dir), run_date(other)
    record = _read(run_dir / INPUTS_FILE)
    if own == taken or record["inputs"] or _given_dates[-1] is not None:
        return own
    record["date"] = taken
    write_json(run_dir / INPUTS_FILE, record)
    return taken


def _create_once(file: Path, text: str) -> None:
    """Write a file unless another process has: the first one wins."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text)
    try:
        os.link(partial, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not file.is_file():
            partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def enclosing_run(path: Path) -> Path | None:
    """Return the nearest run folder that has recorded its inputs: the path itself, or a folder that it is in."""
    return next((folder for folder in (path, *path.parents) if (folder / INPUTS_FILE).is_file()), None)


def recorded_inputs(run_dir: Path) -> dict[str, Identity]:
    """Return the inputs that a run has claimed; none if it has no record of them."""
    file = run_dir / INPUTS_FILE
    return _identities(file, _read(file)["inputs"]) if file.is_file() else {}


def record_output(run_dir: Path, name: str, identity: Identity) -> None:
    """Record what a run has made, for `run.json`; the first process only."""
    made = recorded_outputs(run_dir) | {name: identity}
    content = {key: value.to_json() for key, value in made.items()}
    write_json(run_dir / OUTPUTS_FILE, content)


def recorded_outputs(run_dir: Path) -> dict[str, Identity]:
    """Return what a run has recorded to have made."""
    for file in (run_dir / OUTPUTS_FILE, run_dir / RECORD):
        if file.is_file():
            content = _object(file)
            return _identities(file, content if file.name == OUTPUTS_FILE else content.get("outputs", {}))
    return {}


def _read(file: Path) -> dict[str, Any]:
    record = _object(file)
    if record.get("format") != FORMAT or not _is_date(record.get("date")) or "inputs" not in record:
        raise ValueError(
            f"{file} has format {str(record.get('format'))[:20]} and the date {str(record.get('date'))[:20]}; read is "
            f"format {FORMAT} with a date and inputs. Finish the run with the version that started it, or give "
            "--overwrite to start anew."
        )
    return record


def _is_date(text: object) -> bool:
    try:
        return isinstance(text, str) and bool(date.fromisoformat(text))
    except ValueError:
        return False


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}. Restore the file, or give --overwrite to start anew.") from error


def _identities(file: Path, content: Any) -> dict[str, Identity]:
    try:
        return {
            str(name): Identity(str(row["path"]), {str(part): str(value) for part, value in row["content"].items()})
            for name, row in content.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}. Restore it, or give --overwrite to start anew.") from error
