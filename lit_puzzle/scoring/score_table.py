"""The table of scores from the values of every sample and item: means, standard errors, ranks, drops and changes.

Reads the files of finished candidates (`lit_puzzle.scoring.score_files`); writes nothing. Source: arXiv 2602.11937
section 4: in each sample the candidates are ranked, and ranks are averaged over a random subset of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lit_puzzle.scoring.evaluations import SCORE
from lit_puzzle.scoring.score_files import COULD_TELL, Entry, ScoreFiles
from lit_puzzle.scoring.scores import Metrics, measure

MEAN_RANK = "mean_rank"
RANKED_BY = ("hidden_mse", "layer_error")  # the first that was scored


def score_table(
    files: ScoreFiles,
    entries: Sequence[Entry],
    rank_samples: Sequence[int],
    evaluations: Mapping[str, tuple[ScoreFiles, Sequence[Entry]]],
    parent_file: str,
) -> dict[tuple[int, str], Metrics]:
    """Compute all metrics of all rows.

    Args:
        files: values of every sample.
        entries: the rows.
        rank_samples: samples over which ranks are averaged.
        evaluations: name of each evaluation -> its files and the rows it was run on.
        parent_file: name of the parent's file in each of them.

    Returns:
        (layer, name) -> metrics, without those that the data could not tell.
    """
    values = dict(zip(entries, files.read([entry.file_name for entry in entries]), strict=True))
    table: dict[tuple[int, str], Metrics] = {}
    for entry in entries:
        values[entry].pop(COULD_TELL, None)
        table[entry.layer, entry.name] = {metric: measure(numbers) for metric, numbers in values[entry].items()}
    for kind in sorted({entry.kind for entry in entries}):
        rivals = [entry for entry in entries if entry.kind == kind and values[entry]]
        losses = [next(values[entry][name] for name in RANKED_BY if name in values[entry]) for entry in rivals]
        ranks = ranks_by_sample(losses, rank_samples)
        for entry, numbers in zip(rivals, ranks, strict=True):
            table[entry.layer, entry.name][MEAN_RANK] = measure(numbers)
    for name, (evaluated, rows) in evaluations.items():
        if not rows:
            continue
        parent, *others = evaluated.read([parent_file, *(entry.file_name for entry in rows)])
        for entry, own in zip(rows, others, strict=True):
            for measured in own.keys() - {COULD_TELL}:  # nothing where none of the items could tell
                changes = [after - before for before, after in zip(parent[measured], own[measured], strict=True)]
                if measured == SCORE:  # a drop is a loss
                    table[entry.layer, entry.name][name] = measure([-change for change in changes])
                else:
                    table[entry.layer, entry.name][f"{name}/{measured}"] = measure(changes)
    return table


def parent_means(evaluations: Mapping[str, tuple[ScoreFiles, Sequence[Entry]]], parent_file: str) -> dict[str, float]:
    """Return the parent's own mean of everything that evaluations measure, by the names of their changes."""
    found = {}
    for name, (files, rows) in evaluations.items():
        for measured, values in files.read([parent_file])[0].items() if rows else ():
            found[name if measured == SCORE else f"{name}/{measured}"] = sum(values) / len(values)
    return found


def shares(
    files: ScoreFiles, entries: Sequence[Entry], evaluations: Mapping[str, tuple[ScoreFiles, Sequence[Entry]]]
) -> dict[tuple[int, str], dict[str, float]]:
    """Return the share of tokens (`tokens`), and of the items of each evaluation, that could tell; by row.

    A file of an earlier version does not say; its row then has no share.
    """
    found: dict[tuple[int, str], dict[str, float]] = {}
    for name, (own, rows) in {"tokens": (files, entries), **evaluations}.items():
        for entry, values in zip(rows, own.read([entry.file_name for entry in rows]), strict=True):
            for share in values.get(COULD_TELL, []):
                found.setdefault((entry.layer, entry.name), {})[name] = share
    return found


def ranks_by_sample(losses: Sequence[Sequence[float]], samples: Sequence[int]) -> list[list[float]]:
    """Rank the candidates by their loss in each sample, from 1 / candidates to 1, as in the paper.

    Args:
        losses: for each candidate the loss of every sample.
        samples: indices of the samples that are used.

    Returns:
        For each candidate its rank / number of candidates in each of `samples`; equal losses share their mean rank.
    """
    by_sample = [_ranks([row[sample] for row in losses]) / len(losses) for sample in samples]
    return [[float(ranks[candidate]) for ranks in by_sample] for candidate in range(len(losses))]


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Rank values from 1; equal values share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_of_each = counts.cumsum()
    return (last_of_each - (counts - 1) / 2)[places]
