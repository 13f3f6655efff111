"""One damage per candidate from the scores of a library: the numbers that the search adds up.

A candidate's experts and its window may be scored apart ("experts=64" and "window=8192" of a layer) or as a pair; the
damage of a child is the sum over its layers.

    window_metric None:  damage = the pair's own score in `metric` when it was measured,
                         else score(experts) + score(window)
    window_metric given: damage = (1 - balance) score(experts) / S_experts + balance (w / S_w + TIE m / S_m)
        w = max over the layer's windows at least as wide of max(0, score in `window_metric`)
        m = score of the window in `metric`, where the file has it

Scores of experts are in `metric`. S is the sum over layers of the worst candidate of that kind in the layer: the worst
everywhere costs 1 of each kind, so a damage means something beside others of the same library only. `balance` says how
much of it windows stand for. An accuracy that rises by chance when a layer gets a window earns nothing, and a narrower
window, which sees less, is never taken for the milder one; between windows that long contexts cannot tell apart, the
ordinary score decides (TIE = 0.01).

Source: arXiv 2602.11937 scores windows by long-context accuracy and experts by the distance of hidden states; how it
mixes the two scales is not published: this is a choice, with one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from lit_puzzle.library.library import Candidate, Library, parts
from lit_puzzle.scoring.scores import Scores

TIE = 0.01


@dataclass(frozen=True)
class Objective:
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

    def quality_losses(self, library: Library, scores: Scores) -> list[list[float]]:
        """The damage of every candidate of every layer; 0 for the parent's own block.

        Raises:
            ValueError: The scores are of another parent, or one is missing or not a finite number.
        """
        scores.check_parent(library.parent_fingerprint)
        if self.window_metric is None:
            return [[self._summed(scores, layer, c) for c in row] for layer, row in enumerate(library.layers)]
        rows = list(enumerate(library.layers))
        experts = _of_worst_1([[self._part(scores, layer, c, 0) for c in row] for layer, row in rows])
        windows = _of_worst_1([self._windows(scores, layer, row) for layer, row in rows])
        ties = _of_worst_1([[self._ordinary(scores, layer, c) for c in row] for layer, row in rows])
        return [
            [(1 - self.balance) * e + self.balance * (w + TIE * m) for e, w, m in zip(*grids)]
            for grids in zip(experts, windows, ties)
        ]

    def _windows(self, scores: Scores, layer: int, row: Sequence[Candidate]) -> list[float]:
        """Damage of every candidate's window: none where it is the parent's, never less than that of a wider one."""
        drops = {c.block.window_tokens or 0: self._part(scores, layer, c, 1) for c in row if parts(c)[1] is not None}
        worst = dict(zip(sorted(drops, reverse=True), accumulate((drops[w] for w in sorted(drops, reverse=True)), max)))
        return [0.0 if parts(c)[1] is None else max(0.0, worst[c.block.window_tokens or 0]) for c in row]

    def _ordinary(self, scores: Scores, layer: int, candidate: Candidate) -> float:
        """The window's score in `metric`; 0 where there is none."""
        name = parts(candidate)[1]
        if name is None or self.metric not in scores.entries[layer, name]:
            return 0.0
        return _value(scores, layer, candidate, name, self.metric)

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


def _of_worst_1(grid: list[list[float]]) -> list[list[float]]:
    """The grid over the sum over layers of the worst candidate, unless nothing does damage."""
    scale = math.fsum(max(0.0, max(row)) for row in grid) or 1.0
    return [[value / scale for value in row] for row in grid]


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
