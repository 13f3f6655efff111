"""Whether a stage of a pipeline is complete, and still what its recipe and its inputs would give.

Reads records of run folders and the notes of the pipeline; writes nothing. Contents of inputs are those that runs have
recorded: a stage whose upstream was made again with the same result stays complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from lit_puzzle.pipeline.notes import Notes
from lit_puzzle.pipeline.stages import Stage
from lit_puzzle.run.config_changes import compare_configs
from lit_puzzle.run.files import read_json, read_text, resolved
from lit_puzzle.run.folder import CONFIG, RECORD, is_complete
from lit_puzzle.run.identity import Identity, file_identity, text_hash
from lit_puzzle.run.inputs import SHOWN, recorded_inputs, recorded_outputs
from lit_puzzle.run.lineage import is_part_of
from lit_puzzle.run.marker import MARKER, has_results, is_run_folder, is_unclaimed

SHOWN_CHANGES = 3


@dataclass(frozen=True)
class State:
    """The state of a stage.

    Attributes:
        kind: `new`, `incomplete`, `complete`; `changed`: of another recipe or other inputs than now.
        why: of `changed`, what differs.
    """

    kind: Literal["new", "incomplete", "complete", "changed"]
    why: str = ""


def state_of(stage: Stage, stages: dict[str, Stage], notes: Notes) -> State:
    """Return the state of a stage.

    Args:
        stage: the stage.
        stages: all stages of the pipeline by name.
        notes: of the pipeline.

    Raises:
        ValueError: its folder is not one of a run, or a record is damaged.
    """
    if is_unclaimed(stage.folder):
        return State("new")
    if not is_run_folder(stage.folder):
        raise ValueError(
            f"{stage.folder} is not empty and no run folder (it has no {MARKER}), so that it is left alone. Move it "
            "away, or choose another --run_dir."
        )
    complete = is_complete(stage.folder)
    differing = _recipe_change(stage, notes, complete) or next(_input_changes(stage, stages, notes), "")
    if differing:
        return State("changed", differing)
    return State("complete" if complete else "incomplete")


def _recipe_change(stage: Stage, notes: Notes, complete: bool) -> str:
    """Return how the recipe of a stage differs from now; empty if it does not, or only in what may change on resume."""
    note = notes.stages.get(stage.name)
    if not complete and (note is None or not has_results(stage.folder)):
        return ""
    if note is None:
        return "it was not made by this pipeline"
    file = stage.folder / CONFIG
    if complete and note.config is not None and (not file.is_file() or text_hash(read_text(file)) != note.config):
        return "it was made again by another command"
    _, changes = compare_configs(note.values, stage.values, ())
    forbidden, _ = compare_configs(note.values.get("values", {}), stage.values["values"], ())
    if not changes or not (complete or forbidden):
        return ""
    named = [f"{each.key.removeprefix('values.')}: {each.before} -> {each.now}" for each in changes[:SHOWN_CHANGES]]
    return f"keys have changed since: {', '.join(named)}{' and more' if len(changes) > SHOWN_CHANGES else ''}"


def _input_changes(stage: Stage, stages: dict[str, Stage], notes: Notes) -> Iterator[str]:
    """Yield what an earlier stage has made anew since this one was started with it."""
    for name, identity in recorded_inputs(stage.folder).items():
        place = _placed(Path(identity.path), notes)
        for other in (stages[read] for read in stage.reads):
            if place.is_relative_to(resolved(other.folder)) and is_complete(other.folder):
                differing = _difference(identity, place, stage, other, notes)
                if differing:
                    yield f"{name} ({other.name}) was made anew since: {differing}"


def _placed(path: Path, notes: Notes) -> Path:
    """Return where a recorded input lies now, if the folder of the pipeline was moved."""
    if path.is_relative_to(notes.place):
        path = notes.folder / path.relative_to(notes.place)
    return resolved(path)


def _difference(identity: Identity, place: Path, stage: Stage, other: Stage, notes: Notes) -> str:
    """Return how an input differs from what the run it lies in has made; empty if it does not."""
    outputs = [*recorded_outputs(other.folder).values()]
    if any(is_part_of(output, identity) for output in [*outputs, file_identity(other.folder, [RECORD])]):
        return ""
    for output in outputs:
        shared = [part for part in output.content if part in identity.content]
        if shared and _placed(Path(output.path), notes) == place:
            part = shared[0]
            return f"{part} {output.content[part][:SHOWN]} instead of {identity.content[part][:SHOWN]}"
    return _ended_later(stage, other) if is_complete(stage.folder) else ""


def _ended_later(stage: Stage, other: Stage) -> str:
    """Return why another stage may have ended after this one, by their records alone; empty if it did not.

    For inputs of which the other stage has recorded no content that could be compared.
    """
    ends = {}
    for each in (stage, other):
        ended = str(read_json(each.folder / RECORD).get("ended", ""))
        try:
            ends[each.name] = datetime.fromisoformat(ended).timestamp()
        except ValueError:
            return (
                f"{each.folder / RECORD} does not say when the run ended (`ended` is {ended!r}), so it cannot be known"
            )
    return f"{other.name} ended after this stage" if ends[other.name] > ends[stage.name] else ""
