"""A stage that is interrupted and started again: killed, out of disk, terminated, or started twice.

Every trial ends by the same command once more, which must end with the files of the uninterrupted run, byte for byte,
and the same numbers in run.json; or be refused clearly.
"""

import errno
import json
import os
import random
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from faults.case import Trials, last_line, results
from faults.commands import End, Run
from faults.damage import Damage, all_of
from faults.world import OUT, STAGES

LIMIT_SECONDS = 180.0
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG))


@dataclass(frozen=True)
class Whole:
    """The uninterrupted run of a stage: the changes that it makes, its results, and its largest file in bytes."""

    changes: list[str]
    files: dict[str, bytes]
    numbers: dict[str, Any]
    names: frozenset[str]
    largest: int


class Interruptions:
    """Interrupted runs of stages of the small world.

    Args:
        trials: makes folders and runs commands.
    """

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self.wholes: dict[str, Whole] = {}

    def whole(self, stage: str) -> Whole:
        """Return the uninterrupted run of a stage."""
        if stage not in self.wholes:
            folder = self.folder(stage)
            end = self.run(stage, folder)
            assert end.status == 0, end.said
            out = folder / OUT
            largest = max(path.stat().st_size for path in out.rglob("*") if path.is_file())
            self.wholes[stage] = Whole(end.changes, *read_results(stage, out), names(out), largest)
            shutil.rmtree(folder)
        return self.wholes[stage]

    def folder(self, stage: str, damage: Damage = all_of()) -> Path:  # noqa: B008  (does nothing)
        """Return a new folder with the inputs of a stage."""
        return self.trials.prepared(stage, (), damage)

    def run(self, stage: str, folder: Path, *words: str, **how: Any) -> End:
        """Run a stage in a folder; `how` are fields of `Run`."""
        [end] = self.trials.server.run(self.request(stage, folder, *words, **how))
        return end

    def request(self, stage: str, folder: Path, *words: str, output: str = "", **how: Any) -> Run:
        """Return the command of a stage in a folder."""
        command = STAGES[stage].command(*words)
        return replace(Run(command, str(folder), f"{folder}{output}.txt", limit_seconds=LIMIT_SECONDS), **how)

    def killed(self, stage: str, *before: int) -> tuple[str, str]:
        """Kill a stage before its N-th change (and the next attempt before its M-th), then run it to its end.

        Returns:
            What was killed where, and what is wrong, or "".
        """
        changes, folder = self.whole(stage).changes, self.folder(stage)
        where: list[str] = []
        for number in before:
            if (folder / OUT / "run.json").is_file():  # only the lock was left to remove
                break
            end = self.run(stage, folder, kill_before_change=number)
            allowed = (-signal.SIGKILL, 0) if where else (-signal.SIGKILL,)  # a second attempt may make fewer changes
            where.append(f"{number}. {changes[number - 1]}")
            if end.status not in allowed:
                return ", ".join(where), f"exit code {end.status} instead of a kill: {last_line(end.said)}"
        return ", ".join(where), self.ends_right(stage, folder)

    def torn(self, stage: str, file_bytes: int) -> tuple[str, str]:
        """End a stage in the middle of writing the first file beyond a size, then run it to its end."""
        folder = self.folder(stage)
        end = self.run(stage, folder, file_bytes=file_bytes, dies_when_full=True)
        where = f"file beyond {file_bytes} bytes"
        if end.status not in (-signal.SIGXFSZ, 0):
            return where, f"exit code {end.status}: {last_line(end.said)}"
        return where, "" if end.status == 0 else self.ends_right(stage, folder)

    def full_disk(self, stage: str, file_bytes: int) -> tuple[str, str]:
        """Let a stage write no file beyond a size: a clear error; with room again, the right result."""
        folder = self.folder(stage)
        end = self.run(stage, folder, file_bytes=file_bytes)
        where = f"no room beyond {file_bytes} bytes"
        if end.status == 0:
            return where, ""
        if end.status != 2 or end.has_traceback or not any(reason in end.said for reason in FULL):
            return where, f"exit code {end.status}, file and reason expected: {last_line(end.said)}"
        if OUT not in end.said[end.said.rfind("error: ") :]:
            return where, f"the message names no file: {last_line(end.said)}"
        return where, self.ends_right(stage, folder)

    def replaced(self, stage: str, damage: Damage, *said: str) -> str:
        """Kill a stage late, replace an input, and start it again: refused; with the old input, the right result."""
        changes = self.whole(stage).changes
        folder = self.folder(stage)
        end = self.run(stage, folder, kill_before_change=last_result(changes))
        assert end.status == -signal.SIGKILL, end.said
        before = Path(shutil.copytree(folder, f"{folder}.before"))
        damage(folder)
        end = self.run(stage, folder)
        message = end.said[end.said.rfind("error: ") :]
        if end.status == 0:
            return "SILENT: the other input was accepted"
        missing = [word for word in said if not any(part in message for part in word.split("|"))]
        if end.status != 2 or end.has_traceback or missing:
            return f"exit code {end.status}, message without {missing}: {last_line(end.said)}"
        for name in STAGES[stage].inputs:
            shutil.rmtree(folder / name)
            shutil.copytree(before / name, folder / name)
        shutil.rmtree(before)
        return self.ends_right(stage, folder)

    def together(self, stage: str, *words: str) -> str:
        """Start a stage twice, the second (with more words) when the first has claimed the folder: one ends right."""
        folder = self.folder(stage)
        first = self.request(stage, folder, output=".1")
        second = self.request(stage, folder, *words, output=".2", waits_for=str(folder / OUT / "config.yaml"))
        return self.one_of_two(stage, folder, *self.trials.server.run(first, second))

    def at_once(self, stage: str) -> str:
        """Start a stage twice at the same moment: one ends right, the other is refused."""
        folder = self.folder(stage)
        runs = [self.request(stage, folder, output=f".{number}") for number in (1, 2)]
        return self.one_of_two(stage, folder, *self.trials.server.run(*runs))

    def one_of_two(self, stage: str, folder: Path, *ends: End) -> str:
        """Return what is wrong with two starts of the same run folder, or ""."""
        if sorted(end.status for end in ends) != [0, 2] or any(end.has_traceback for end in ends):
            return f"exit codes {[end.status for end in ends]}: {[last_line(end.said) for end in ends]}"
        return self.difference(stage, folder)

    def terminated(self, stage: str, when: str, number: int, *statuses: int) -> str:
        """Send a stage a signal when a file appears: one of these exit statuses, then the right result."""
        folder = self.folder(stage)
        end = self.run(stage, folder, signal_when=f"{OUT}/{when}", signal=number)
        if end.status not in statuses or end.has_traceback:
            return f"exit code {end.status}, not {statuses}: {last_line(end.said)}"
        return self.ends_right(stage, folder)

    def changed_after(self, stage: str, change: str, damage: Damage) -> tuple[Path, End]:
        """Kill a stage before its first change of this beginning, damage the folder, and start it again."""
        changes = self.whole(stage).changes
        number = next(number for number, done in enumerate(changes, 1) if done.split(" ", 1)[1].startswith(change))
        folder = self.folder(stage)
        end = self.run(stage, folder, kill_before_change=number)
        assert end.status == -signal.SIGKILL, end.said
        damage(folder)
        return folder, self.run(stage, folder)

    def ends_right(self, stage: str, folder: Path) -> str:
        """Run the same command to its end, if it has not come there; return what is wrong, or ""."""
        if (folder / OUT / "run.json").is_file():
            return self.difference(stage, folder, was_complete=True)
        end = self.run(stage, folder)
        if end.too_slow or end.has_traceback or end.status != 0:
            return f"the same command again: exit code {end.status}: {last_line(end.said)}"
        return self.difference(stage, folder)

    def difference(self, stage: str, folder: Path, was_complete: bool = False) -> str:
        """Return how a complete run folder differs from the uninterrupted one, or "" and remove it.

        Args:
            stage: the stage.
            folder: the trial.
            was_complete: whether the run was killed when only its lock was left to remove.
        """
        whole = self.whole(stage)
        files, numbers = read_results(stage, folder / OUT)
        wrong = sorted(name for name in {*files, *whole.files} if files.get(name) != whole.files.get(name))
        wrong += sorted(key for key in {*numbers, *whole.numbers} if numbers.get(key) != whole.numbers.get(key))
        rest = sorted(name for name in names(folder / OUT) - whole.names if is_partial(name))
        if wrong or (rest and not was_complete):
            return f"WRONG RESULT: {wrong} differ; left over: {rest}"
        shutil.rmtree(folder)
        return ""


def read_results(stage: str, out: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the result files and the headline numbers of a complete run; times differ from run to run."""
    record = json.loads((out / "run.json").read_text())
    numbers = {key: value for key, value in record["results"].items() if "seconds" not in key}
    return results(out, STAGES[stage].results), numbers


def names(out: Path) -> frozenset[str]:
    """Return the names of all files of a run folder."""
    return frozenset(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def is_partial(name: str) -> bool:
    """Return whether a file is one that a writer had not finished."""
    return ".partial" in name or any(part.startswith(".") and part != ".metadata" for part in name.split("/"))


def last_result(changes: list[str]) -> int:
    """Return the number of the change that makes run.json, before which everything else is done."""
    return next(number for number, change in enumerate(changes, 1) if "run.json" in change)


def kill_points(seed: int, stage: str, changes: int, count: int) -> list[int]:
    """Draw numbers of changes, different ones while there are any."""
    draw = random.Random(f"{seed} {stage}")
    return sorted(draw.sample(range(1, changes + 1), min(count, changes)))
