"""What a pipeline would run, and what each stage costs: `lightning run PIPELINE --plan`. Starts nothing.

Reads what the plans of the stages read, and the records of the pipeline's folder. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_puzzle.footprint.plan import OPTIONS, Plan, make_plan, split_words
from lit_puzzle.footprint.table import shown_bytes, shown_seconds
from lit_puzzle.pipeline.notes import Notes
from lit_puzzle.pipeline.progress import START_SECONDS
from lit_puzzle.pipeline.stages import Stage, read_stages
from lit_puzzle.pipeline.states import State, state_of
from lit_puzzle.run.commands import PIPELINE, is_own, target_of
from lit_puzzle.run.recipe import Recipe, recipe_that_makes
from lit_puzzle.run.recipe_values import recipe_values

SHOWN_READS = 4
WILL = {
    "new": "runs",
    "incomplete": "is resumed",
    "complete": "complete",
}


def stage_plan(stage: Stage, stages: Mapping[str, Stage], options: Sequence[str] = ()) -> Plan | None:
    """Return the plan of a stage; None for code of the user.

    Inputs that are not made yet are planned by the recipes that make them, documents by the stage that will.

    Args:
        stage: the stage.
        stages: all stages by name.
        options: of the plan (`--gpus=8`).

    Raises:
        ValueError: the stage's own plan refuses a value.
    """
    if not is_own(stage.command):
        return None
    wired = [word for word in stage.wired if Path(word.partition("=")[2]).exists()]
    options = [*options, *_document_tokens(stage, stages)]
    words = [word for word in stage.words if not _is_unknown(word, stage)]
    return make_plan(stage.recipe, stage.command, target_of(stage.command), [*words, *wired, *options])


def _is_unknown(word: str, stage: Stage) -> bool:
    """Return whether a word leads to a folder that only this pipeline will make; its recipe's own input is like it."""
    key, _, text = word.partition("=")
    keys = {wired.partition("=")[0] for wired in stage.wired}
    return key in keys and not Path(text).exists() and recipe_that_makes(Path(text)) is None


def _document_tokens(stage: Stage, stages: Mapping[str, Stage]) -> list[str]:
    """Return the option that says how many tokens of documents an earlier stage will make."""
    for other in (stages[name] for name in stage.reads):
        plan = stage_plan(other, stages) if other.command == "generate" else None
        works = () if plan is None else plan.footprint.works
        tokens = sum(w.sequences * (w.read_tokens + (w.decoding.tokens if w.decoding else 0)) for w in works)
        if tokens:
            return [f"--document_tokens={round(tokens)}"]
    return []


def planned_seconds(stage: Stage, stages: Mapping[str, Stage]) -> float:
    """Return the seconds of a stage by its plan, the start of its process included; what has no plan costs a start."""
    try:
        plan = stage_plan(stage, stages)
    except ValueError:
        return START_SECONDS
    seconds = 0.0 if plan is None else float(plan.to_json()["seconds"])
    return START_SECONDS + (seconds if math.isfinite(seconds) else 0.0)


def stage_row(stage: Stage, stages: dict[str, Stage], notes: Notes, options: Sequence[str]) -> dict[str, Any]:
    """Return what is known of a stage before it runs, as plain JSON."""
    state = State("new") if stage.left_out else state_of(stage, stages, notes)
    row: dict[str, Any] = {"stage": stage.name, "recipe": stage.entry.recipe, "reads": list(stage.reads)}
    row |= {"state": "left_out" if stage.left_out else state.kind, "why": stage.left_out or state.why}
    plan = None if stage.left_out else stage_plan(stage, stages, options)
    note = notes.stages.get(stage.name)
    row["measured_seconds"] = note.seconds if note and state.kind == "complete" else None
    if plan is not None:
        row |= {key: value for key, value in plan.to_json().items() if key not in ("recipe", "stage")}
    return row


def pipeline_rows(stages: Sequence[Stage], run_dir: Path, options: Sequence[str]) -> list[dict[str, Any]]:
    """Return what is known of every stage before it runs, as plain JSON."""
    by_name, notes = {stage.name: stage for stage in stages}, Notes.read(run_dir)
    return [stage_row(stage, by_name, notes, options) for stage in stages]


def plan_of_pipeline(recipe: Recipe, words: Sequence[str]) -> list[str]:
    """Return what `--plan` prints for a pipeline: a table, or JSON with `--json`.

    Args:
        recipe: of the pipeline, its stage recipes located.
        words: options of the plan and overrides.

    Raises:
        ValueError: what would refuse the pipeline before it runs, or an option.
    """
    options, rest = split_words(words)
    values = recipe_values(recipe, rest, target_of(PIPELINE))
    run_dir = values.path("run_dir")
    stages = read_stages(run_dir, values.at("stages"), values.get("overrides") or {})
    given = [f"--{name}={value}" for name, value in options.items() if name in OPTIONS]
    rows = pipeline_rows(stages, run_dir, given)
    return [json.dumps(rows, indent=2)] if "json" in options else pipeline_lines(rows, recipe.path, run_dir)


def pipeline_lines(rows: Sequence[dict[str, Any]], path: Path, run_dir: Path) -> list[str]:
    """Return the plan of a pipeline as a table."""
    lines = [f"{path}: {len(rows)} stages into {run_dir}"]
    lines.append(f"{'stage':<20} {'what happens':<12} {'memory':>11} {'disk':>11} {'planned':>13}  reads")
    notes = []
    for row in rows:
        what = WILL.get(row["state"], row["state"].replace("_", " "))
        memory = shown_bytes(row["peak_bytes"]) if "peak_bytes" in row else ""
        disk = shown_bytes(sum(row["disk_bytes"].values())) if "disk_bytes" in row else ""
        planned = shown_seconds(row["seconds"]) if "seconds" in row else ""
        more = len(row["reads"]) - SHOWN_READS
        reads = ", ".join(row["reads"][:SHOWN_READS]) + (f" and {more} more" if more > 0 else "") or "no stage"
        lines.append(f"{row['stage']:<20} {what:<12} {memory:>11} {disk:>11} {planned:>13}  {reads}")
        if row["why"]:
            notes.append(f"{row['stage']}: {what}: {row['why']}")
        if row.get("advice"):
            notes += [f"{row['stage']} DOES NOT FIT: {line}" for line in row["advice"]]
    waiting = [row for row in rows if row["state"] in ("new", "incomplete", "changed")]
    seconds = sum(row.get("seconds", 0.0) for row in waiting)
    written = sum(sum(row.get("disk_bytes", {}).values()) for row in waiting)
    total = (
        f"to run: {len(waiting)} of {len(rows)} stages, {shown_bytes(written)} of disk, {shown_seconds(seconds)} of "
    )
    lines.append(f"{total}arithmetic, and {START_SECONDS:.0f} seconds a stage to start")
    return [*lines, *notes, "more on one of them: lightning run RECIPE --plan"]
