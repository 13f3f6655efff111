"""The lineage of a run as a tree: its inputs, the runs that made them, their inputs, and so on.

Reads the records of run folders (`lit_puzzle.run.inputs`), not the inputs themselves; writes nothing. An input agrees
if its recorded content is that of something that the run it lies in has recorded to have made. It disagrees if that run
has recorded another content at the same place: it was run again since, and its own inputs say nothing about this one,
so that the tree ends there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lit_puzzle.report.run_summary import RunSummary, enclosing_folder, read_run
from lit_puzzle.run.files import resolved
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import SHOWN, recorded_inputs, recorded_outputs
from lit_puzzle.run.lineage import is_part_of

UNREADABLE = (ValueError, OSError, RuntimeError)  # damaged records, no permission, links in a circle
DISAGREES = "DISAGREES"
PROBLEMS = "problems"
FIRST_PARTS = ("weights", "files", PROBLEMS)  # the part that identifies best comes first


def identity_text(identity: Identity, full: bool = False) -> str:
    """Return path and content of an input or output in a line.

    Args:
        identity: what was recorded.
        full: whether every part is shown with all digits, instead of the first one with 12.
    """
    parts = [*(name for name in FIRST_PARTS if name in identity.content), *sorted(identity.content)]
    names = list(dict.fromkeys(parts)) if full else parts[:1]
    hashes = [f"{name} {identity.content[name] if full else identity.content[name][:SHOWN]}" for name in names]
    return "  ".join([identity.path, *(hashes or ["no content recorded"])])


def made_lines(run: RunSummary, full: bool) -> list[str]:
    """Return what a run has recorded to have made, a line each."""
    made = recorded_outputs(run.folder)
    lines = [f"  {name}: {identity_text(identity, full)}" for name, identity in made.items()]
    return ["", "made", *lines] if lines else []


def lineage_lines(run: RunSummary, full: bool) -> list[str]:
    """Return the tree of a run's inputs as lines; the heading counts those that disagree.

    Raises:
        ValueError: the run's own record of its inputs is damaged; that of another run is said in its place.
    """
    tree = _Tree(full)
    tree.add(run, "  ")
    if not tree.lines:
        return ["", "lineage: no inputs recorded"]
    counts = f" (disagreements: {tree.disagreements})" if tree.disagreements else ""
    return ["", f"lineage{counts}", *tree.lines]


@dataclass
class _Tree:
    """Lines of a tree while it grows."""

    full: bool
    lines: list[str] = field(default_factory=list)
    disagreements: int = 0
    seen: set[Path] = field(default_factory=set)

    def add(self, run: RunSummary, margin: str) -> None:
        """Add the inputs of a run, each with the run that made it."""
        self.seen.add(resolved(run.folder))
        for name, identity in recorded_inputs(run.folder).items():
            self.lines.append(f"{margin}{name}: {identity_text(identity, self.full)}")
            try:
                place = run.located(identity.path)
                if not place.is_relative_to(resolved(run.folder)):  # else the run made it for itself
                    self._add_maker(place, identity, margin + "    ")
            except UNREADABLE as error:
                self.lines.append(f"{margin}    its origin cannot be read: {error}")

    def _add_maker(self, place: Path, identity: Identity, margin: str) -> None:
        folder = enclosing_folder(place)
        if folder is None:
            if not place.exists() and PROBLEMS not in identity.content:  # of those, the path may be a description
                self.lines.append(f"{margin}not there any more, or moved")
            elif place.is_relative_to(PACKAGE):
                self.lines.append(f"{margin}comes with lit_puzzle")
            return
        maker = read_run(folder)
        verdict = self._verdict(maker, place, identity)
        self.lines.append(f"{margin}{verdict}")
        if folder in self.seen:
            self.lines[-1] += "; see above"
        elif not verdict.startswith(DISAGREES):
            self.add(maker, margin + "  ")

    def _verdict(self, maker: RunSummary, place: Path, identity: Identity) -> str:
        """Return how an input relates to what the run that it lies in has recorded to have made."""
        outputs = recorded_outputs(maker.folder)
        state = f"{_short(maker.folder)} ({maker.command}, {maker.state.partition(';')[0]}, {maker.commit})"
        name = next((name for name, output in outputs.items() if is_part_of(output, identity)), None)
        if name is not None:
            return f"made as {name} by {state}"
        for name, output in outputs.items():
            shared = [part for part in output.content if part in identity.content]
            if shared and maker.located(output.path) == place:
                self.disagreements += 1
                said = ", ".join(f"{part} {output.content[part][:SHOWN]}" for part in shared)
                return f"{DISAGREES}: {state} has recorded {said} here, as {name}: it was run again since, or changed"
        return f"lies in {state}, which has not recorded its content"


def _short(folder: Path) -> str:
    """Return a path relative to the current folder if it lies in it."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
