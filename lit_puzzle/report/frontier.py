"""The frontier of a parent and its child: two evaluations and two throughputs become requests, with intervals.

Reads `episodes.parquet` of two runs of `evaluate` on the same prompts, and `throughput.json`. Writes `frontier.json`:
every setting, number and interval, the verdict, and where the numbers come from. Formulas:
`lit_puzzle.report.request_rates` and `envelope`.

Accuracy and tokens must be of the same prompts under the same sampling, and throughputs of the same hardware and
scenario: evaluations that differ in sampling or problems are refused. Memory: 24 bytes a request and its row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_puzzle.costs.throughputs import THROUGHPUT_FILE, Throughputs, read_throughputs
from lit_puzzle.environments.episodes import EPISODES_FILE, Episode, read_rows
from lit_puzzle.evaluate.alike import check_alike
from lit_puzzle.evaluate.standard_errors import detectable, mean_and_error, prompts_of
from lit_puzzle.report.envelope import frontier as envelope
from lit_puzzle.report.envelope import verdict
from lit_puzzle.report.paired_requests import intervals, pair
from lit_puzzle.report.request_rates import Model, judge, points
from lit_puzzle.run.files import write_json
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import file_identity
from lit_puzzle.run.inputs import claim_inputs, enclosing_run, record_output, recorded_inputs
from lit_puzzle.run.recipe import load_recipe

FRONTIER_FILE = "frontier.json"


def frontier(
    run_dir: Path,
    parent: Path,
    child: Path,
    throughput: Path,
    reference_effort: str = "high",
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Compare a child with its parent in requests.

    Args:
        run_dir: the run's folder; gets `frontier.json`.
        parent: run folder of the parent's evaluation.
        child: run folder of the child's evaluation, of the same prompts.
        throughput: run folder of `throughput`, of both models in one scenario.
        reference_effort: effort at which the parent's request rate is 1.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The numbers of `judge`; of each that has an interval, its ends under `<number>_low` and `<number>_high`; per
        effort `loops/<effort>/parent|child|detectable`, `unfinished/<effort>/parent|child|detectable` and
        `accuracy/<effort>/detectable`, the paired difference that so many prompts show with a probability of 80 %.

    Raises:
        ValueError: evaluations of other prompts or other sampling, or too few resamples.
    """
    if resamples < 100:
        raise ValueError(f"resamples {resamples} was given; the ends of an interval need 100 or more.")
    folders = {"parent": require_input(parent, "evaluation of the parent", EPISODES_FILE)}
    folders["child"] = require_input(child, "evaluation of the child", EPISODES_FILE)
    speeds_of = read_throughputs(throughput)
    inputs = {name: file_identity(folder, [EPISODES_FILE]) for name, folder in folders.items()}
    claim_inputs(run_dir, inputs | {"throughput": file_identity(throughput, [THROUGHPUT_FILE])})
    check_alike(folders, more=("kv_cache",))
    notes = compare_folders(folders, throughput)
    rows = [read_rows(folder / EPISODES_FILE) for folder in folders.values()]
    requests = pair(*rows)
    speeds = (speeds_of.parent, speeds_of.child)
    models = requests.models(speeds)

    def numbers(old: Model, new: Model) -> dict[str, float]:
        return judge(old, new, reference_effort)

    found = numbers(*models)
    bounds = intervals(requests, speeds, numbers, resamples, seed)
    shares = _shares(*rows)
    vertices = [envelope(points(model, models[0], reference_effort)) for model in models]
    sentence = verdict(vertices[0], vertices[1])
    content = {
        "throughput": asdict(speeds_of),
        "reference_effort": reference_effort,
        "settings": {name: _settings(model) for name, model in zip(folders, models, strict=True)},
        "numbers": found | shares,
        "intervals": bounds,
        "vertices": {name: [asdict(point) for point in line] for name, line in zip(folders, vertices, strict=True)},
        "verdict": sentence,
        "notes": notes,
        "requests_per_model": len(rows[0]),
    }
    write_json(run_dir / FRONTIER_FILE, content)
    record_output(run_dir, "frontier", file_identity(run_dir, [FRONTIER_FILE]))
    ends = {
        f"{name}_{end}": value
        for name, pair_ in bounds.items()
        for end, value in zip(("low", "high"), pair_, strict=True)
    }
    _print(found, bounds, shares, requests.efforts, speeds_of, sentence)
    for note in notes:
        Console().print(f"note: {note}", soft_wrap=True)
    return found | shares | ends


def compare_folders(folders: Mapping[str, Path], throughput: Path) -> list[str]:
    """Return what the evaluations and the throughputs do not have in common, as far as their runs have recorded it.

    The recovered child may have been evaluated and the exported one timed: another `config.json` is a note.

    Args:
        folders: of the parent's and of the child's evaluation.
        throughput: run folder of `throughput`.

    Raises:
        ValueError: the throughput of one was taken for the other.
    """
    runs = {name: enclosing_run(folder) for name, folder in folders.items()}
    recorded = {name: {} if run is None else recorded_inputs(run) for name, run in runs.items()}
    evaluated = {name: known["checkpoint"] for name, known in recorded.items() if "checkpoint" in known}
    timed_run = enclosing_run(throughput)
    timed = {} if timed_run is None else recorded_inputs(timed_run)
    configs = {key: one.content.get("config") for key, one in timed.items()}
    notes = []
    for name, identity in evaluated.items():
        own, other = configs.get(name), configs.get("child" if name == "parent" else "parent")
        config = identity.content.get("config")
        if config == other != own:
            raise ValueError(
                f"The {name} that was evaluated, {identity.path}, is what {throughput} timed as the other model, "
                f"{timed['child' if name == 'parent' else 'parent'].path}: parent and child are exchanged somewhere."
            )
        if own is not None and config != own:
            notes.append(f"evaluated was {identity.path}, timed {timed[name].path}, whose config.json differs")
    engines = [load_recipe(str(run / "config.yaml")).value("engine") for run in runs.values() if run is not None]
    if len(engines) == 2 and engines[0] != engines[1]:
        notes.append(f"the parent was evaluated by the engine {engines[0]}, the child by {engines[1]}")
    return notes


def _settings(model: Model) -> dict[str, object]:
    return {effort: asdict(setting) for effort, setting in model.settings.items()}


def _shares(parent: Sequence[Episode], child: Sequence[Episode]) -> dict[str, float]:
    """Return shares of loops and unfinished answers, and the differences that so many prompts can show."""
    found = {}
    for effort in dict.fromkeys(episode.effort for episode in parent):
        pairs = [(a, b) for a, b in zip(parent, child, strict=True) if a.effort == effort]
        prompts = prompts_of([a for a, _ in pairs])
        values = {
            "accuracy": [(a.correct, b.correct) for a, b in pairs],
            "unfinished": [(float(not a.finished), float(not b.finished)) for a, b in pairs],
        }
        if all(episode.looping is not None for both in pairs for episode in both):
            values["loops"] = [(float(bool(a.looping)), float(bool(b.looping))) for a, b in pairs]
        for name, both in values.items():
            error = mean_and_error([new - old for old, new in both], prompts)[1]
            found[f"{name}/{effort}/detectable"] = detectable(error, len(set(prompts)))
            if name != "accuracy":
                for model, number in (("parent", 0), ("child", 1)):
                    found[f"{name}/{effort}/{model}"] = sum(one[number] for one in both) / len(both)
    return found


def _print(
    found: Mapping[str, float],
    bounds: Mapping[str, tuple[float, float]],
    shares: Mapping[str, float],
    efforts: Sequence[str],
    throughput: Throughputs,
    sentence: str,
) -> None:
    """Print an effort a row, intervals behind the numbers, and the verdict."""

    def cell(name: str, digits: int = 3) -> str:
        if name not in found:
            return ""
        ends = bounds.get(name)
        return f"{found[name]:.{digits}f}" + ("" if ends is None else f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]")

    console = Console()
    table = Table("effort", "request rate, child / parent", "accuracy", "child - parent", "speed-up at equal accuracy")
    for effort in efforts:
        accuracy = " → ".join(f"{found[f'accuracy/{effort}/{model}']:.3f}" for model in ("parent", "child"))
        difference = (
            f"{cell(f'accuracy/{effort}/difference')}; seen from ±{shares[f'accuracy/{effort}/detectable']:.3f}"
        )
        table.add_row(effort, cell(f"request_rate/{effort}/ratio"), accuracy, difference, cell(f"speed_up/{effort}"))
    console.print(table)
    table = Table("effort", "tokens", "child / parent", "unfinished", "loops", "loops seen from")
    for effort in efforts:
        tokens, unfinished = (
            " → ".join(f"{values[f'{name}/{effort}/{model}']:{form}}" for model in ("parent", "child"))
            for values, name, form in ((found, "tokens", ".1f"), (shares, "unfinished", ".3f"))
        )
        loops, least = "", ""
        if f"loops/{effort}/parent" in shares:
            loops = " → ".join(f"{shares[f'loops/{effort}/{model}']:.4f}" for model in ("parent", "child"))
            least = f"±{shares[f'loops/{effort}/detectable']:.4f}"
        table.add_row(effort, tokens, cell(f"tokens/{effort}/ratio"), unfinished, loops, least)
    console.print(table)
    for name, task in sorted({tuple(key.split("/")[1:]) for key in found if key.startswith("retention/")}):
        console.print(f"retention at {name} effort, {task}: {cell(f'retention/{name}/{task}')}")
    console.print(
        f"Throughput ({throughput.kind}; {throughput.scenario}): {throughput.parent:.4g} -> {throughput.child:.4g} "
        "tokens/s, taken as exact. 95 % intervals of the bootstrap over prompts.",
        sentence,
        sep="\n",
        soft_wrap=True,
    )
