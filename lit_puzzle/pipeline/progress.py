"""What a pipeline shows: a line where a stage starts and ends, and in a terminal a bar with the time that is left.

The time left is that of the plans of the stages that are left, times measured over planned seconds of those that have
run. Writes to the standard output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

START_SECONDS = 8.0  # of a process that imports torch, Lightning and transformers


def time_text(seconds: float) -> str:
    """Return a time to the second, or to a tenth of a minute."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


@dataclass
class Progressing:
    """Lines and bar of a pipeline that runs.

    Attributes:
        planned: name of each stage that runs here -> seconds by its plan.
        measured: name -> seconds of those that are complete.
    """

    planned: Mapping[str, float]
    measured: dict[str, float]
    console: Console = field(default_factory=lambda: Console(soft_wrap=True, highlight=False, markup=False))
    _bar: Progress | None = None
    _task: TaskID | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar while the work inside runs, if the output is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        with Progress(*columns, console=self.console, transient=True) as bar:
            self._bar, self._task = bar, bar.add_task("", total=len(self.planned) or 1, left="")
            try:
                yield
            finally:
                self._bar = None

    def line(self, text: str) -> None:
        """Print a line."""
        self.console.print(text)

    def tick(self, name: str, elapsed: float) -> None:
        """Move the bar while a stage runs.

        Args:
            name: of the stage.
            elapsed: its seconds.
        """
        if self._bar is not None and self._task is not None:
            done = len([each for each in self.measured if each in self.planned])
            share = min(elapsed / max(self.planned[name] * self._ratio(), 1.0), 0.95)
            left = f"about {time_text(self.seconds_left(name, elapsed))} left"
            self._bar.update(self._task, description=name, completed=done + share, left=left)

    def seconds_left(self, name: str | None = None, elapsed: float = 0.0) -> float:
        """Return the seconds that are left by plans and measured stages.

        Args:
            name: stage that runs.
            elapsed: its seconds so far.
        """
        ratio = self._ratio()
        waiting = sum(seconds for each, seconds in self.planned.items() if each not in self.measured and each != name)
        running = 0.0 if name is None else max(self.planned[name] * ratio - elapsed, 0.0)
        return waiting * ratio + running

    def _ratio(self) -> float:
        """Return measured over planned seconds of the stages that have run; 1 if none has."""
        known = [name for name, seconds in self.measured.items() if name in self.planned and seconds > 0]
        planned = sum(self.planned[name] for name in known)
        return sum(self.measured[name] for name in known) / planned if planned else 1.0
