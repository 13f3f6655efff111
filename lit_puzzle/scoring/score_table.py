"""From the values of every sample and item to the table of scores: means, standard errors, ranks, accuracy drops.

Reads the files of finished candidates (`lit_puzzle.scoring.score_files`); writes nothing. Source: arXiv
2602.11937 section 4: per sample the candidates are ranked, ranks are averaged over a random subset of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lit_puzzle.scoring.score_files import Entry, ScoreFiles
from lit_puzzle.scoring.scores import Metrics, measure

MEAN_RANK = "mean_rank"
RANKED_BY = "hidden_mse"


def score_table(
    files: ScoreFiles,
    entries: Sequence[Entry],
    rank_samples: Sequence[int],
    answers: Mapping[str, tuple[ScoreFiles, Sequence[Entry]]],
    parent_file: str,
) -> dict[tuple[int, str], Metrics]:
    """All metrics of all rows.

    Args:
        files: Values of every sample.
        entries: The rows.
        rank_samples: Samples over which ranks are averaged.
        answers: For each evaluation its files and the rows it was run on.
        parent_file: Name of the parent's file in each of them.
    """
    values = {entry: files.read(entry.file_name) for entry in entries}
    table: dict[tuple[int, str], Metrics] = {}
    for entry in entries:
        table[entry.layer, entry.name] = {metric: measure(numbers) for metric, numbers in values[entry].items()}
    for kind in sorted({entry.kind for entry in entries}):
        rivals = [entry for entry in entries if entry.kind == kind]
        ranks = ranks_by_sample([values[entry][RANKED_BY] for entry in rivals], rank_samples)
        for entry, numbers in zip(rivals, ranks, strict=True):
            table[entry.layer, entry.name][MEAN_RANK] = measure(numbers)
    for name, (answered, rows) in answers.items():
        before = answered.read(parent_file)["score"] if rows else []
        for entry in rows:
            after = answered.read(entry.file_name)["score"]
            table[entry.layer, entry.name][name] = measure([b - a for b, a in zip(before, after, strict=True)])
    return table


def ranks_by_sample(losses: Sequence[Sequence[float]], samples: Sequence[int]) -> list[list[float]]:
    """The paper's ranks: within each sample, candidates are ranked by their loss, from 1 / candidates to 1.

    Args:
        losses: For each candidate the loss of every sample.
        samples: The samples that are looked at.

    Returns:
        For each candidate its rank / number of candidates in each of `samples`; equal losses share the mean of ranks.
    """
    by_sample = [_ranks([row[sample] for row in losses]) / len(losses) for sample in samples]
    return [[float(ranks[candidate]) for ranks in by_sample] for candidate in range(len(losses))]


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_of_each = counts.cumsum()
    return (last_of_each - (counts - 1) / 2)[places]
