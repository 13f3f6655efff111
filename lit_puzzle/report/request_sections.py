"""Sections of a report that compare parent and child: requests, speed, and sample completions.

Reads frontier.json, throughput.json, plan.json, report.json and rows of completions; writes nothing. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_puzzle.costs.throughputs import THROUGHPUT_FILE, read_throughputs
from lit_puzzle.environments.environment import LEVELS
from lit_puzzle.environments.episodes import EPISODES_FILE, Episode, read_rows
from lit_puzzle.report.envelope import Point, accuracy_at
from lit_puzzle.report.figures import Setting, frontier
from lit_puzzle.report.found_runs import FoundRuns, choice_text
from lit_puzzle.report.frontier import FRONTIER_FILE
from lit_puzzle.report.page import Picture, Sample, Section, Table
from lit_puzzle.report.results_table import number_text
from lit_puzzle.report.run_summary import RunSummary
from lit_puzzle.report.terminal_text import cut, escaped
from lit_puzzle.run.files import read_json
from lit_puzzle.run.identity import file_identity
from lit_puzzle.run.inputs import recorded_inputs

MODELS = ("parent", "child")
STEPS = 40  # of a frontier between its first and last setting
SERVING = "report.json"  # of serve_check


def frontier_section(found: FoundRuns) -> Section:
    """Return the section with requests of parent and child.

    Raises:
        ValueError: the file is damaged, or of another version.
    """
    title, runs = "Requests", found.having(FRONTIER_FILE)
    if not runs:
        return Section(title, missing="No frontier is there: lightning run recipes/frontier.yaml")
    content = Content.read(runs[0].folder / FRONTIER_FILE)
    numbers, bounds = content.of("numbers"), content.of("intervals")
    throughput = content.of("throughput")
    efforts = list(content.of("settings", "parent"))

    def cell(name: str) -> str:
        if name not in numbers:
            return ""
        ends = bounds.get(name)
        return f"{numbers[name]:.3f}" + ("" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]")

    head = ["effort", "request rate, child / parent", "accuracy of the parent", "child - parent", "retention"]
    head += ["tokens, child / parent", "speed-up at equal accuracy", "loops of parent and child"]
    rows = []
    for effort in efforts:
        loops = [cell(f"loops/{effort}/{model}") for model in MODELS]
        names = [f"request_rate/{effort}/ratio", f"accuracy/{effort}/parent", f"accuracy/{effort}/difference"]
        names += [f"accuracy/{effort}/retention", f"tokens/{effort}/ratio", f"speed_up/{effort}"]
        rows.append([effort, *map(cell, names), " and ".join(filter(None, loops))])
    settings = {model: [_setting(numbers, bounds, model, effort) for effort in efforts] for model in MODELS}
    lines = {model: _line([Point(**point) for point in points]) for model, points in content.of("vertices").items()}
    how = f"Throughput is {throughput['kind']} ({throughput['scenario']}) and taken as exact; intervals of 95 %."
    picture = Picture.drawn(
        "frontier",
        "Accuracy against request rate of parent and child",
        frontier(settings, lines, content.of("reference_effort")),
    )
    text = [str(content.of("verdict")), how, *content.values.get("notes", []), *choice_text(runs)]
    return Section(title, text, [picture], [Table(head, rows)], sources=runs[:1])


def _line(vertices: Sequence[Point]) -> list[tuple[float, float]]:
    """Return points (request rate, accuracy) of a frontier, which is straight in cost and so curved in the rate."""
    costs = [vertices[0].cost + share / STEPS * (vertices[-1].cost - vertices[0].cost) for share in range(STEPS + 1)]
    heights = [accuracy_at(vertices, cost) for cost in costs]
    return [(1 / cost, height) for cost, height in zip(costs, heights, strict=True) if height is not None]


def _setting(numbers: Mapping[str, float], bounds: Mapping[str, Sequence[float]], model: str, effort: str) -> Setting:
    names = f"request_rate/{effort}/{model}", f"accuracy/{effort}/{model}"
    ends = [(bounds[name][0], bounds[name][1]) if name in bounds else None for name in names]
    return Setting(effort, numbers[names[0]], numbers[names[1]], *ends)


def speed_section(found: FoundRuns) -> Section:
    """Return the section with predicted and measured speed, and what serving checks found.

    Raises:
        ValueError: a file is damaged.
    """
    searches, timed, served = found.of("search"), found.having(THROUGHPUT_FILE), found.of("serve_check")
    if not searches + timed + served:
        return Section("Speed", missing="No throughput is there: lightning run recipes/throughput.yaml")
    rows = [row for run in searches for row in _predicted(run)]
    for run in timed:
        speed = read_throughputs(run.folder)
        rows.append([str(run.folder), speed.kind, *_speeds(speed.parent, speed.child), speed.scenario])
    head = ["run", "kind", "parent, tokens/s", "child, tokens/s", "child / parent", "scenario"]
    tables = [Table(head, rows)] if rows else []
    for run in served:
        checks = Content.read(run.folder / SERVING).of("checks")
        found_of = [[check["name"], check["outcome"], check["reason"]] for check in checks]
        tables.append(Table([f"check of {run.folder}", "outcome", "found"], found_of))
    text = ["Numbers of different scenarios or kinds are not to be compared with each other, only parent with child."]
    return Section("Speed", text if rows else [], tables=tables, sources=searches + timed + served)


def _predicted(run: RunSummary) -> list[list[str]]:
    """Return the rows of a search: what its cost model predicts in each target."""
    rows = []
    for row in Content.read(run.folder / "plan.json").of("predicted"):
        speeds = [row[model]["tokens_per_second"] if row[model] else None for model in MODELS]
        rows.append([str(run.folder), "predicted", *_speeds(*speeds), _where(row["target"]["scenario"])])
    return rows


def _where(scenario: Mapping[str, Any]) -> str:
    lengths = f"{scenario['prompt_tokens']:,} prompt and {scenario['generated_tokens']:,} generated tokens"
    return f"{scenario['num_gpus']} x {scenario['gpu']}, {lengths}"


def _speeds(parent: float | None, child: float | None) -> list[str]:
    ratio = "" if parent is None or child is None else f"{child / parent:.3f}"
    return [*("does not fit" if value is None else number_text(value) for value in (parent, child)), ratio]


def samples_section(found: FoundRuns, samples: int) -> Section:
    """Return the section with completions of parent and child for the same prompts.

    Args:
        found: the runs.
        samples: how many of each effort and of each kind: only the child right, only the parent, both, neither.
    """
    title, runs = "Sample completions", found.having(FRONTIER_FILE)
    if not runs:
        return Section(title, missing="No frontier names the evaluations of parent and child.")
    compared, files = recorded_inputs(runs[0].folder), compared_rows(runs[0])
    if not all(file.is_file() for file in files):
        return Section(title, missing=f"The rows that {runs[0].folder} compared are not there any more.")
    for model, file in zip(MODELS, files, strict=True):
        if file_identity(file.parent, [EPISODES_FILE]).content != compared[model].content:
            return Section(title, missing=f"{file} has changed since {runs[0].folder} compared it.")
    pairs = [pair for pair in zip(*map(read_rows, files), strict=True) if all(one.texts is not None for one in pair)]
    shown = [_sample(*pair) for effort in LEVELS for pair in _chosen(pairs, effort, samples)]
    text = ["The same prompts, by parent and child." if pairs else "The rows have no texts (texts: false)."]
    return Section(title, text, samples=shown, sources=runs[:1])


def compared_rows(run: RunSummary) -> list[Path]:
    """Return the files of rows of parent and child that a frontier's run compared, whether they are there or not.

    They are looked for where they were, and beside the run, if the folders have moved together.

    Raises:
        ValueError: its record is damaged.
        KeyError: its record names no such evaluations.
    """
    compared = recorded_inputs(run.folder)
    files = []
    for model in MODELS:
        recorded = compared[model].path
        file = run.located(recorded) / EPISODES_FILE
        files.append(file if file.is_file() else run.folder.parent / Path(recorded).name / EPISODES_FILE)
    return files


def _chosen(pairs: Sequence[tuple[Episode, Episode]], effort: str, count: int) -> list[tuple[Episode, Episode]]:
    """Return the first pairs of each kind at an effort."""
    kinds: dict[tuple[bool, bool], list[tuple[Episode, Episode]]] = {
        kind: [] for kind in ((False, True), (True, False), (True, True), (False, False))
    }
    for parent, child in pairs:
        kind = kinds[parent.correct == 1, child.correct == 1]
        if parent.effort == effort and len(kind) < count:
            kind.append((parent, child))
    return [pair for kind in kinds.values() for pair in kind]


def _sample(parent: Episode, child: Episode) -> Sample:
    texts = {}
    if parent.texts is not None and child.texts is not None:
        texts = {
            f"prompt; the right answer is {escaped(cut(parent.texts.answer))}": parent.texts.prompt,
            f"parent: {parent.verdict.reason}, {parent.generated_tokens} tokens": parent.texts.completion,
            f"child: {child.verdict.reason}, {child.generated_tokens} tokens": child.texts.completion,
        }
    title = f"{parent.environment}, {parent.effort} effort, problem {parent.problem}"
    return Sample(title, {label: escaped(cut(text), line_breaks=True) for label, text in texts.items()})


@dataclass(frozen=True)
class Content:
    """A JSON file of a run, whose keys are named when they are not there.

    Attributes:
        file: the file.
        values: the object in it.
    """

    file: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path) -> Content:
        """Read a file.

        Raises:
            ValueError: it is missing or damaged.
        """
        return cls(file, read_json(file))

    def of(self, *keys: str) -> Any:
        """Return what lies under keys.

        Raises:
            ValueError: a key is not there.
        """
        value: Any = self.values
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                raise ValueError(f"{self.file} has no {'.'.join(keys)}: it is damaged, or of another version.")
            value = value[key]
        return value
