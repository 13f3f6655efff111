"""Lineage: which runs have led to a checkpoint, by what they recorded of their inputs and outputs.

Reads `run.json` and `inputs.json` of run folders; writes nothing. A run is an ancestor if one of its outputs is the
checkpoint, or an input of another ancestor. Only contents count; paths lead from an input to the run that made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lit_puzzle.run.files import read_yaml, resolved
from lit_puzzle.run.folder import CONFIG, RECORD
from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import SHOWN, enclosing_run, recorded_inputs, recorded_outputs


@dataclass(frozen=True)
class Step:
    """A run as one step of a lineage.

    Attributes:
        folder: the run folder.
        inputs: what it was started with.
        outputs: what it has made.
    """

    folder: Path
    inputs: Mapping[str, Identity]
    outputs: Mapping[str, Identity]

    @classmethod
    def read(cls, path: Path) -> Step:
        """Read the records of a run, given by its folder or its run.json.

        Raises:
            ValueError: a record is damaged.
        """
        folder = path.parent if path.name == RECORD else path
        return cls(folder, recorded_inputs(folder), recorded_outputs(folder))

    def made(self, wanted: Iterable[Identity]) -> bool:
        """Return whether one of its outputs is one of these."""
        return any(is_part_of(output, identity) for output in self.outputs.values() for identity in wanted)


def is_part_of(output: Identity, identity: Identity) -> bool:
    """Return whether all that is recorded of an output is the same in an input (which may have more parts)."""
    return bool(output.content) and output.content.items() <= identity.content.items()


def ancestors(of: Identity, named: Iterable[Path] = ()) -> list[Step]:
    """Return the runs that have led to a checkpoint or another output, the newest first.

    Args:
        of: identity of what was made.
        named: run folders that may be ancestors, besides those that recorded paths lead to.

    Raises:
        ValueError: a record of a run is damaged.
    """
    wanted, found = [of], list[Step]()
    waiting = {resolved(step.folder): step for step in map(Step.read, named)}
    known = set(waiting)
    paths = [of.path]
    while True:
        for run in filter(None, (enclosing_run(resolved(Path(path))) for path in paths)):
            if run not in known:
                known.add(run)
                waiting[run] = Step.read(run)
        reached = [folder for folder, step in waiting.items() if step.made(wanted)]
        if not reached:
            return found
        new = [waiting.pop(folder) for folder in reached]
        found += new
        inputs = [identity for step in new for identity in step.inputs.values()]
        wanted += inputs
        paths = [identity.path for identity in inputs]


def training_runs(of: Identity) -> list[Path]:
    """Return the folders of the training runs that the weights of a checkpoint went through, the first one first.

    Weights pass from a parent to a child, from one child to the next, and from a library with trained blocks; a parent
    that a child was only distilled from gives it none.

    Raises:
        ValueError: a record of a run is damaged.
    """
    found, waiting = dict[Path, Step](), [of]
    while waiting:
        identity = waiting.pop()
        run = enclosing_run(resolved(Path(identity.path)))
        if run is None or run in found:
            continue
        step = Step.read(run)
        if step.made([identity]):
            found[run] = step
            waiting += [step.inputs[name] for name in _sources(step.inputs)]
    return [folder for folder in reversed(found) if _trains(folder)]


def _sources(inputs: Mapping[str, Identity]) -> list[str]:
    """Return the names of the inputs that a run took weights from."""
    weights = next((name for name in ("child", "checkpoint", "parent") if name in inputs), None)
    return [name for name in ("library", weights) if name in inputs and name is not None]


def _trains(folder: Path) -> bool:
    recipe = read_yaml(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return isinstance(recipe, Mapping) and recipe.get("command") == "fit"


def check_ancestors(of: Identity, named: Iterable[Path], claimed_by: str) -> None:
    """Check that named runs have led to a checkpoint.

    Args:
        of: identity of the checkpoint.
        named: run folders, or their run.json.
        claimed_by: where they are named, for messages.

    Raises:
        ValueError: one has not, or has not recorded what it made.
    """
    named = list(named)
    reached = {resolved(step.folder) for step in ancestors(of, named)}
    for step in map(Step.read, named):
        if resolved(step.folder) in reached:
            continue
        made = ", ".join(f"{name} ({_short(identity)})" for name, identity in step.outputs.items())
        what = f"it made {made}" if made else "it has no record of what it made"
        raise ValueError(
            f"{claimed_by} names {step.folder}, but {of.path} ({_short(of)}) did not come from this run: {what}. Name "
            "the runs that led to these weights, or leave it out."
        )


def check_made_with(made: Path, name: str, given: Identity, remedy: str) -> None:
    """Check that what a run has made is paired with the very input that the run had.

    Scores name blocks by numbers of experts, and plans by their experts: those of another library fit by name. What
    lies in no run folder, such as a file written by hand, is not judged.

    Args:
        made: what a run has made: its folder, or a file in it.
        name: name of the input in that run.
        given: what it is paired with now.
        remedy: what to do, for the message.

    Raises:
        ValueError: the run had another input of that name.
    """
    run = enclosing_run(resolved(made))
    had = None if run is None else recorded_inputs(run).get(name)
    if had is not None and had.content != given.content:
        raise ValueError(
            f"{made} was made with another {name}: {run} had {had.path} ({_short(had)}), now {given.path} "
            f"({_short(given)}) is given. {remedy}"
        )


def _short(identity: Identity) -> str:
    part = "weights" if "weights" in identity.content else next(iter(identity.content), "")
    return f"{part} {identity.content.get(part, 'unknown')[:SHOWN]}"
