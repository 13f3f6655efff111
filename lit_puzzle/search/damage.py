"""One damage per candidate from the scores of a library: the numbers that the search adds up.

A candidate's experts and its window may be scored apart ("experts=64" and "window=8192" of a layer) or as a pair; the
damage of a child is the sum over its layers.

    window_metric None:  damage = the pair's own score in `metric` when it was measured,
                         else score(experts) + score(window)
    window_metric given: damage = (1 - balance) score(experts) / S_experts + balance max(0, score(window)) / S_window

where the scores of experts are in `metric` and those of windows in `window_metric`, and S is the sum over layers of the
worst candidate of that kind in the layer: the worst everywhere costs 1 of each kind. `balance` says how much of the
damage windows stand for; an accuracy that rises by chance when a layer gets a window earns nothing.

Source: arXiv 2602.11937 scores windows by long-context accuracy and experts by the distance of hidden states; how it
mixes the two scales is not published: this is a choice, with one parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lit_puzzle.search.library import Candidate, Library, parts
from lit_puzzle.search.scores import Scores


@dataclass(frozen=True)
class DamageRule:
    """Which scores make a damage.

    Attributes:
        metric: Metric of the scores file, for experts (and for windows, unless `window_metric` is given).
        window_metric: Metric for windows, such as the drop of accuracy on long contexts.
        balance: Weight of windows against experts, 0 to 1; used with `window_metric` only.
    """

    metric: str = "kl"
    window_metric: str | None = None
    balance: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.balance <= 1:
            raise ValueError(f"DamageRule: balance must be between 0 and 1, got {self.balance}")

    def damages(self, library: Library, scores: Scores) -> list[list[float]]:
        """The damage of every candidate of every layer; 0 for the parent's own block.

        Raises:
            ValueError: The scores are of another parent, or one is missing or not a finite number.
        """
        scores.check_parent(library.parent_fingerprint)
        if self.window_metric is None:
            return [[self._summed(scores, layer, c) for c in row] for layer, row in enumerate(library.layers)]
        experts = [[self._part(scores, layer, c, 0) for c in row] for layer, row in enumerate(library.layers)]
        windows = [[max(0.0, self._part(scores, layer, c, 1)) for c in row] for layer, row in enumerate(library.layers)]
        expert_scale, window_scale = _worst(experts), _worst(windows)
        return [
            [(1 - self.balance) * e / expert_scale + self.balance * w / window_scale for e, w in zip(*rows)]
            for rows in zip(experts, windows)
        ]

    def _summed(self, scores: Scores, layer: int, candidate: Candidate) -> float:
        if None not in parts(candidate) and self.metric in scores.entries.get((layer, candidate.name), {}):
            return _value(scores, layer, candidate, candidate.name, self.metric)
        return self._part(scores, layer, candidate, 0) + self._part(scores, layer, candidate, 1)

    def _part(self, scores: Scores, layer: int, candidate: Candidate, part: int) -> float:
        name = parts(candidate)[part]
        if name is None:
            return 0.0
        metric = self.metric if part == 0 or self.window_metric is None else self.window_metric
        return _value(scores, layer, candidate, name, metric)


def _worst(grid: list[list[float]]) -> float:
    """Sum over layers of the worst candidate; 1 when nothing does damage."""
    return math.fsum(max(0.0, *row) if len(row) > 1 else max(0.0, row[0]) for row in grid) or 1.0


def _value(scores: Scores, layer: int, candidate: Candidate, name: str, metric: str) -> float:
    where = f"layer {layer}, candidate {candidate.name!r}"
    metrics = scores.entries.get((layer, name))
    if metrics is None:
        raise ValueError(
            f"{where}: the scores have no entry {name!r} of this layer. Score this library with recipes/score.yaml, or "
            "leave the candidate out of the library."
        )
    if metric not in metrics:
        raise ValueError(f"{where}: the scores have no metric {metric!r} of {name!r}; they have {sorted(metrics)}")
    value = metrics[metric].mean
    if not math.isfinite(value):
        raise ValueError(f"{where}: the score {metric!r} of {name!r} is {value}; score that candidate again")
    return value
