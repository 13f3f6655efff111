"""Runs the recipes of stages in their order, each as a process, into one folder.

Reads the recipes of the stages. Writes into the run folder one run folder for each stage (RUN/STAGE), its output
(RUN/STAGE.log), and `pipeline.json`. A stage that is complete and unchanged is not run again, an interrupted one is
resumed, and the first that fails ends the pipeline with the command to rerun. Everything that can be known beforehand
(recipes, keys, order, changed stages) is refused before anything runs.

Memory: of the stages, one at a time. The pipeline itself imports no torch.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from lit_puzzle.pipeline.notes import Note, Notes
from lit_puzzle.pipeline.plan import planned_seconds
from lit_puzzle.pipeline.process import Ended, run_process, wait_for_worker
from lit_puzzle.pipeline.progress import Progressing, time_text
from lit_puzzle.pipeline.stages import Stage, read_stages
from lit_puzzle.pipeline.states import State, state_of
from lit_puzzle.run.folder import RECORD, is_complete
from lit_puzzle.run.inputs import run_date
from lit_puzzle.run.verify import verifies_all


# Without types of their parts: of `Any`, the parser would make objects of the class paths inside.
def pipeline(
    run_dir: Path,
    stages: list,  # type: ignore[type-arg]
    overrides: dict | None = None,  # type: ignore[type-arg]
    remake: bool = False,
) -> dict[str, float]:
    """Run stages in their order.

    Args:
        run_dir: the pipeline's folder; gets a run folder and a log of each stage.
        stages: of each `recipe`, and where needed `name`, `overrides`, `needs`, `otherwise`, `print_output`, `each`.
        overrides: stage -> dotted key -> value, on top of those of the stages.
        remake: whether stages whose recipe or inputs have changed are made anew; false: they are refused.

    Returns:
        `stages`, and of each stage that is complete `seconds/<stage>` and `cpu_seconds/<stage>`.

    Raises:
        ValueError: a recipe, key or order that is wrong, or a changed stage.
        SystemExit: a stage has failed; with its exit code.
    """
    found = read_stages(run_dir, stages, overrides or {})
    notes, by_name = Notes.read(run_dir), {stage.name: stage for stage in found}
    for stage in found:
        wait_for_worker(stage.folder)
    states = {stage.name: state_of(stage, by_name, notes) for stage in found if not stage.left_out}
    _check_unchanged(states, remake)
    (run_dir / RECORD).unlink(missing_ok=True)
    open_ones = [stage for stage in found if not stage.left_out and states[stage.name].kind != "complete"]
    known = {name: note.seconds for name, note in notes.stages.items() if name in states}
    measured = {name: known.get(name, 0.0) for name, state in states.items() if state.kind == "complete"}
    running = [stage for stage in found if not stage.left_out] if open_ones else []
    planned = {stage.name: planned_seconds(stage, by_name) for stage in running}
    shown = Progressing(planned, measured)
    with shown.shown():
        for place, stage in enumerate(found, 1):
            _one(stage, f"[{place}/{len(found)}] {stage.name}", by_name, notes, shown, remake)
    return _results(found, notes)


def _check_unchanged(states: Mapping[str, State], remake: bool) -> None:
    """Refuse changed stages, unless they are made anew.

    Raises:
        ValueError: names them, what differs, and what to do.
    """
    changed = [f"{name}: {state.why}" for name, state in states.items() if state.kind == "changed"]
    if changed and not remake:
        raise ValueError(
            f"{'; '.join(changed)}. Undo that, choose another --run_dir, or give --remake=true, which makes these "
            "stages anew, and those that read them."
        )


def _one(stage: Stage, title: str, stages: dict[str, Stage], notes: Notes, shown: Progressing, remake: bool) -> None:
    """Run a stage if it has to, say so, and print what it printed if its recipe wants that."""
    if stage.left_out:
        shown.line(f"{title}: left out: {stage.left_out}")
        return
    state = state_of(stage, stages, notes)
    _check_unchanged({stage.name: state}, remake)
    log = stage.folder.with_name(f"{stage.name}.log")
    if state.kind == "complete":
        shown.line(f"{title}: complete")
    else:
        _run(stage, title, state, log, notes, shown)
    if stage.entry.print_output and _is_of_this_run(log, stage.folder / RECORD):
        shown.line("\n".join(_output(log)))


def _run(stage: Stage, title: str, state: State, log: Path, notes: Notes, shown: Progressing) -> None:
    """Run a stage into its folder and its log.

    Raises:
        SystemExit: it has failed.
    """
    anew = state.kind == "changed"
    does = {"new": "starts", "incomplete": "is resumed", "changed": f"is made anew: {state.why}"}[state.kind]
    shown.measured.pop(stage.name, None)
    words = _words(stage, anew)
    shown.line(f"{title}: {does} (log: {log}; about {time_text(shown.seconds_left())} left in all)")
    before = notes.stages.get(stage.name)
    kept = before if before is not None and state.kind == "incomplete" else Note({})
    note = Note(stage.values, None, kept.seconds, kept.cpu_seconds, kept.attempts)
    notes.keep(stage.name, note)
    ended = run_process(words, log, lambda seconds: shown.tick(stage.name, seconds))
    log.touch()  # younger than what the stage wrote
    notes.keep(stage.name, note.after(stage.folder, ended.seconds, ended.cpu_seconds))
    if ended.code or not is_complete(stage.folder):
        _fail(title, log, ended, words)
    shown.measured[stage.name] = notes.stages[stage.name].seconds
    shown.line(f"{title}: complete after {time_text(ended.seconds)} ({time_text(ended.cpu_seconds)} of CPU)")


def _words(stage: Stage, anew: bool) -> list[str]:
    """Return the command line of a stage."""
    more = [f"--chat_date={run_date(stage.folder.parent)}"] if stage.values["values"].get("chat_date") is None else []
    more += ["--verify=full"] if verifies_all() else []
    return ["run", *stage.arguments, *more, *(["--overwrite"] if anew else [])]


def _is_of_this_run(log: Path, record: Path) -> bool:
    """Return whether a log tells how its stage was completed, rather than of an attempt before that."""
    return log.is_file() and log.stat().st_mtime_ns >= record.stat().st_mtime_ns


def _output(log: Path) -> list[str]:
    """Return what the latest attempt has printed."""
    lines = log.read_text(errors="replace").splitlines()
    starts = [place for place, line in enumerate(lines) if line.startswith("$ lightning run ")]
    return lines[starts[-1] + 1 :] if starts else lines


def _fail(title: str, log: Path, ended: Ended, words: list[str]) -> None:
    """End the pipeline with the last lines of a stage that has failed, and what to do.

    Raises:
        SystemExit: always, with the stage's exit code.
    """
    code = ended.code or 1
    last = "\n    ".join(ended.last_lines) or "(it printed nothing)"
    again, alone = shlex.join(["lightning", *sys.argv[1:]]), shlex.join(["lightning", *words])
    print(
        f"{title}: failed with exit code {code} after {time_text(ended.seconds)}. Its last lines ({log}):\n    {last}\n"
        f"This stage alone: {alone}\nTo resume the pipeline: {again}",
        file=sys.stderr,
        flush=True,
    )
    raise SystemExit(code)


def _results(stages: list[Stage], notes: Notes) -> dict[str, float]:
    complete = [stage.name for stage in stages if not stage.left_out]
    found: dict[str, float] = {"stages": float(len(complete))}
    for name in complete:
        found |= {f"seconds/{name}": notes.stages[name].seconds, f"cpu_seconds/{name}": notes.stages[name].cpu_seconds}
    return found
