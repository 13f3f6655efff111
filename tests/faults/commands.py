"""Commands of `lightning`, tried through the server of `faults.server`."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    """One command to try.

    Args:
        words: the command line after the program's name.
        folder: the current folder.
        output: file that gets what it prints.
        limit_seconds: how long it may take.
        environment: variables to set.
        watched: folder whose changes are counted, relative to `folder`.
        kill_before_change: the change before which it is killed, from 1.
        file_bytes: no file may grow beyond.
        dies_when_full: a longer write ends the process instead of failing.
        waits_for: file that has to exist before it begins.
        signal_when: file at whose appearance the process gets a signal.
        signal: which.
    """

    words: list[str]
    folder: str
    output: str
    limit_seconds: float = 60.0
    environment: dict[str, str] = field(default_factory=dict)
    watched: str = "out"
    kill_before_change: int | None = None
    file_bytes: int | None = None
    dies_when_full: bool = False
    waits_for: str | None = None
    signal_when: str | None = None
    signal: int = signal.SIGTERM


@dataclass(frozen=True)
class End:
    """What became of a command: its exit status (negative: the signal), what it printed, and the changes it made."""

    status: int
    seconds: float
    too_slow: bool
    said: str
    changes: list[str]

    @property
    def has_traceback(self) -> bool:
        """Whether Python printed a traceback."""
        return "Traceback (most recent call last)" in self.said or "Traceback\n" in self.said


class Server:
    """The process that runs commands; a context manager."""

    def __init__(self) -> None:
        paths = [str(ROOT), str(ROOT / "tests")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "200",
        }
        command = [sys.executable, "-m", "faults.server"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def run(self, *runs: Run) -> list[End]:
        """Run commands, all started at the same time, and return what became of them."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([asdict(run) for run in runs]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the server of tests/faults has died"
        return [
            End(said=read(run.output), changes=read(run.output + ".changes").splitlines(), **end)
            for run, end in zip(runs, json.loads(answer), strict=True)
        ]

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.process.kill()  # the end of its input does not reach it while a fork of this process has the pipe open
        self.process.wait()


def read(path: str) -> str:
    """Return the text of a file, empty if there is none."""
    return Path(path).read_text(errors="replace") if Path(path).is_file() else ""
