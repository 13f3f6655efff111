"""Ablations: the evaluations of a grid as a table, a row for each variant, means over seeds and their standard errors.

    mean over seeds +- s / sqrt(n), s the standard deviation over the n seeds

An evaluation belongs to a grid if its folder is called STAGE-VARIANT-SEED, as in a pipeline with `each`
(`recipes/ablations.yaml`), and others of its stage lie beside it. +- holds what a seed changes, not which problems were
asked: they must be the same for all variants of a table. Reads records of runs; writes nothing. Imports no torch.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_puzzle.environments.environment import LEVELS
from lit_puzzle.evaluate.alike import check_alike
from lit_puzzle.report.found_runs import FoundRuns
from lit_puzzle.report.page import Section, Table
from lit_puzzle.report.run_summary import RunSummary

TITLE = "Ablations"
NAME = re.compile(r"(?P<stage>[^-]+)-(?P<variant>.+)-(?P<seed>\d+)")
MEASURED = "evaluate"  # the command of the runs


@dataclass(frozen=True)
class Grid:
    """The evaluations of a grid.

    Attributes:
        folder: of all of them.
        stage: that they are of.
        variants: variant -> its runs, one for each seed, in their order.
        unfinished: names of those that are not complete.
    """

    folder: Path
    stage: str
    variants: Mapping[str, Sequence[RunSummary]]
    unfinished: Sequence[str]

    @property
    def name(self) -> Path:
        """Folder and stage, as a message names them."""
        return self.folder / self.stage

    @property
    def runs(self) -> list[RunSummary]:
        """Every run."""
        return [run for runs in self.variants.values() for run in runs]


def grids(found: FoundRuns) -> list[Grid]:
    """Return the grids among runs, by folder and stage; a grid has at least two variants."""
    named: dict[tuple[Path, str], dict[str, dict[int, RunSummary]]] = {}
    for run in found.of(MEASURED):
        match = NAME.fullmatch(run.folder.name)
        if match:
            variants = named.setdefault((run.folder.parent, match["stage"]), {})
            variants.setdefault(match["variant"], {})[int(match["seed"])] = run
    result = []
    for (folder, stage), by_variant in sorted(named.items()):
        left = [path.name for path in found.left_out if path.parent == folder and NAME.fullmatch(path.name)]
        ordered = {variant: [runs[seed] for seed in sorted(runs)] for variant, runs in by_variant.items()}
        if len(ordered) > 1:
            result.append(Grid(folder, stage, ordered, [name for name in left if name.startswith(f"{stage}-")]))
    return result


def ablation_table(grid: Grid) -> Table:
    """Return a grid as a table, the variant with the highest mean accuracy first.

    Raises:
        ValueError: the evaluations were not asked and graded alike, or have no effort in common.
    """
    first, *others = grid.runs
    for other in others:
        check_alike({each.folder.name: each.folder for each in (first, other)})
    results = {variant: [_results(run) for run in runs] for variant, runs in grid.variants.items()}
    every = [result for seeds in results.values() for result in seeds]
    efforts = [effort for effort in LEVELS if all(f"accuracy/{effort}" in result for result in every)]
    if not efforts:
        raise ValueError(f"{grid.name}: its evaluations have no effort in common.")
    means = {
        variant: [statistics.mean(seed[f"accuracy/{effort}"] for effort in efforts) for seed in seeds]
        for variant, seeds in results.items()
    }
    rows = []
    for variant in sorted(results, key=lambda name: (-statistics.mean(means[name]), name)):
        seeds = results[variant]
        cells = [mean_text([seed[f"accuracy/{effort}"] for seed in seeds]) for effort in efforts]
        tokens = " / ".join(f"{statistics.mean(seed[f'tokens/{effort}'] for seed in seeds):.1f}" for effort in efforts)
        each = ", ".join(f"{mean:.3f}" for mean in means[variant])
        rows.append([variant, str(len(seeds)), *cells, mean_text(means[variant]), each, tokens])
    return Table(["variant", "seeds", *efforts, "mean", "each seed", "tokens"], rows)


def mean_text(values: Sequence[float]) -> str:
    """Return a mean, +- its standard error where there are several values."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"


def _results(run: RunSummary) -> Mapping[str, float]:
    results: Mapping[str, float] = (run.record or {})["results"]
    return results


def ablations_section(found: FoundRuns) -> Section:
    """Return the section with a table for each grid; of one that gives none, the reason."""
    known = grids(found)
    if not known:
        why = "No grid of evaluations (STAGE-VARIANT-SEED) is there: lightning run recipes/ablations.yaml"
        return Section(TITLE, missing=why)
    drawn, tables, refused = [], [], []
    for grid in known:
        try:
            tables.append(ablation_table(grid))
            drawn.append(grid)
        except ValueError as error:
            refused.append(f"No table of {grid.name}: {error}")
    if not tables:
        return Section(TITLE, missing=" ".join(refused))
    text = ["Accuracy by effort and its mean over efforts; ± is the standard error of the mean over seeds."]
    text += [f"From top to bottom: {', '.join(str(grid.name) for grid in drawn)}.", *refused]
    text += [f"Not finished in {grid.folder}: {', '.join(grid.unfinished)}." for grid in drawn if grid.unfinished]
    return Section(TITLE, text, tables=tables, sources=[run for grid in drawn for run in grid.runs])
