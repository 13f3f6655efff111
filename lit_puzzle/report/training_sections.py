"""Sections of a report about training: curves of every run, and the accuracy that every run has measured.

Reads metrics.csv and run.json; writes nothing. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_puzzle.environments.environment import LEVELS
from lit_puzzle.report.figures import Series, curves
from lit_puzzle.report.found_runs import DAMAGED, FoundRuns
from lit_puzzle.report.page import Picture, Section, Table
from lit_puzzle.report.run_summary import RunSummary
from lit_puzzle.training.metrics_file import MetricsFile

METRICS = ("lightning_logs/version_*/metrics.csv", "logs/metrics.csv")  # of Lightning's logger and of ours
MOST_CURVES = 8
STATES = ("before", "after")
REWARD, LOSSES = "train/reward", ("train/loss", "val/loss")  # the first panel has the one or the other
BY_EFFORT = ("val/accuracy/{}", "val/tokens/{}", "length/{}/mean")
DRAWN = {REWARD, *LOSSES, *(name.format(effort) for name in BY_EFFORT for effort in LEVELS)}


def curves_section(found: FoundRuns) -> Section:
    """Return the section with the curves of training: reward or loss, accuracy and generated tokens per effort."""
    title = "Training"
    drawn: list[tuple[RunSummary, Picture]] = []
    older, damaged = [], []
    for run in found.complete:
        panels: Mapping[str, Sequence[Series]] = {}  # frees those of the run before
        try:
            panels = _panels(_columns(_metrics_files(run.folder)))
            if panels and len(drawn) < MOST_CURVES:
                says = f"Training of {run.folder}: {', '.join(panels)}"
                drawn.append((run, Picture.drawn(f"training_{len(drawn) + 1}", says, curves(panels))))
            elif panels:
                older.append(str(run.folder))
        except DAMAGED as error:
            damaged.append(f"{run.folder} cannot be drawn: {error}")
    if not drawn + damaged:
        return Section(title, missing="No run with metrics.csv is there: lightning run recipes/rl_recover.yaml")
    text = [f"From top to bottom: {'; '.join(str(run.folder) for run, _ in drawn) or 'none'}.", *damaged]
    text += [f"Not drawn, as they are older: {', '.join(older)}."] if older else []
    return Section(title, text, [picture for _, picture in drawn], sources=[run for run, _ in drawn])


def _metrics_files(folder: Path) -> list[Path]:
    """Return the files of metrics of a run, those of later attempts last."""
    found = [file for pattern in METRICS for file in folder.glob(pattern)]
    return sorted(found, key=lambda file: (len(str(file)), str(file)))  # version_2 before version_10


Columns = dict[str, list[tuple[float, float]]]  # metric -> (update, value)


def _columns(files: Sequence[Path]) -> Columns:
    """Read what is drawn of files of metrics, several where each attempt began its own; an update's last value counts.

    Raises:
        ValueError: a file has something else than numbers.
    """
    found: dict[str, dict[float, float]] = {}
    for file in files:
        for step, values in MetricsFile(file).rows():
            for name, value in values.items():
                if name in DRAWN and math.isfinite(value):
                    found.setdefault(name, {})[step] = value
    return {name: sorted(points.items()) for name, points in found.items()}


def _panels(columns: Columns) -> dict[str, list[Series]]:
    """Return the panels that a run has columns for."""
    reward = (REWARD,) if REWARD in columns else LOSSES
    accuracy, tokens, lengths = BY_EFFORT
    if not {tokens.format("low"), tokens.format("high")} & columns.keys():
        tokens = lengths
    panels = {
        "reward" if REWARD in reward else "loss": [(name, name, place) for place, name in enumerate(reward)],
        "accuracy": [(effort, accuracy.format(effort), 1 + place) for place, effort in enumerate(LEVELS)],
        "tokens": [(effort, tokens.format(effort), 1 + place) for place, effort in enumerate(LEVELS)],
    }
    drawn = {
        name: [Series(label, columns[column], place) for label, column, place in lines if column in columns]
        for name, lines in panels.items()
    }
    return {name: lines for name, lines in drawn.items() if lines}


def results_section(found: FoundRuns) -> Section:
    """Return the section with accuracy, tokens, unfinished and looping completions of every run that measured them."""
    title = "Results of all runs"
    rows: list[list[str]] = []
    runs, text = (
        [],
        ["Accuracy ± standard error, mean generated tokens, shares of unfinished and of looping completions."],
    )
    for run in found.complete:
        try:
            own = _results(run)
        except DAMAGED as error:
            text.append(f"{run.folder} is left out, its results are damaged: {error}")
            continue
        rows += own
        runs += [run] if own else []
    if not runs:
        return Section(title, missing="No run has measured accuracy: lightning run recipes/evaluate.yaml")
    head = ["run", "stage", "effort", "accuracy", "tokens", "unfinished", "looping"]
    return Section(title, text, tables=[Table(head, rows)], sources=runs)


def _results(run: RunSummary) -> list[list[str]]:
    """Return the rows of a run: a state of the model at an effort each."""
    results, rows = (run.record or {}).get("results", {}), []
    for state in ("", *STATES):
        for effort in LEVELS:
            tail, error = (
                (f"{effort}/{state}", f"accuracy/{effort}/{state}_se") if state else (effort, f"accuracy_se/{effort}")
            )
            if f"accuracy/{tail}" not in results:
                continue
            spread = f" ± {results[error]:.3f}" if error in results else ""
            finished = results.get(f"finished/{tail}")
            unfinished = results.get(f"unfinished/{tail}") if finished is None else 1 - finished
            rows.append(
                [
                    f"{run.folder} {state}".strip(),
                    run.stage,
                    effort,
                    f"{results[f'accuracy/{tail}']:.3f}{spread}",
                    *("" if value is None else f"{value:.1f}" for value in [results.get(f"tokens/{tail}")]),
                    *(
                        "" if share is None else f"{share:.2%}"
                        for share in (unfinished, results.get(f"looping/{tail}"))
                    ),
                ]
            )
    return rows
