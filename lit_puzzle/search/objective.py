"""The objective of the search: the quality loss of every candidate, from replace-1-block scores.

The experts and the window of a candidate are scored separately ("experts=64" and "window=8192" of a layer) or together;
the quality loss of a child is the sum over its layers.

    window_metric None:   quality_loss = score(experts, window)                  where the pair was scored, else
                          quality_loss = score(experts) + score(window)          both in `metric`
    window_metric given:  quality_loss = (1 - balance) e / S_e + balance (w / S_w + TIE_BREAK m / S_m)
        e  score of the experts in `metric`
        w  score of the window in `window_metric`: at least 0, and at least that of every wider window of the layer
        m  score of the window in `metric`; 0 where it was not scored
        S  sum over layers of the layer's largest e, w or m: each of the three is normalized so that per-layer maxima
           sum to 1

Normalized losses can only be compared within one library. `balance` is the weight of windows against experts. An
accuracy that rises by chance when a layer gets a window is no gain (w >= 0), and a narrower window never has a lower
loss than a wider one. The tie break (TIE_BREAK = 0.01) orders windows that long-context accuracy cannot distinguish.

A score that was not measured is not 0: the search refuses it, unless `unmeasured` says what to make of it. Refused are
also scores that are 0 throughout, which order nothing, and those of a metric for which more is better.

Reads and writes nothing.

Source: arXiv 2602.11937 scores windows by long-context accuracy and experts by the distance of hidden states. How it
combines the two scales is not published; `balance` is this project's choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, get_args

from lit_puzzle.library.library import Candidate, Library, parts
from lit_puzzle.scoring.scores import Scores

TIE_BREAK = 0.01
Unmeasured = Literal["refuse", "exclude", "zero"]


@dataclass(frozen=True)
class Objective:
    """How scores become a quality loss.

    Args:
        metric: metric of the scores file for experts, and for windows unless `window_metric` is given.
        window_metric: metric for windows, such as the drop of long-context accuracy; None uses `metric`.
        balance: weight of windows against experts, 0 to 1; used with `window_metric` only.
        unmeasured: what to do about candidates whose scores the data could not tell: `refuse` the search, `exclude`
            them from it, or count them as `zero`.

    Raises:
        ValueError: `balance` is not between 0 and 1, or `unmeasured` is none of the three.
    """

    metric: str = "kl"
    window_metric: str | None = None
    balance: float = 0.5
    unmeasured: Unmeasured = "refuse"

    def __post_init__(self) -> None:
        if self.unmeasured not in get_args(Unmeasured):
            raise ValueError(f"Objective: unmeasured must be one of {get_args(Unmeasured)}, got {self.unmeasured!r}")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"Objective: balance must be between 0 and 1, got {self.balance}")

    def quality_losses(self, library: Library, scores: Scores) -> list[list[float]]:
        """Return the quality loss of every candidate of every layer; 0 for the parent's own block.

        Raises:
            ValueError: the scores are of another parent, one of them is missing or not finite, all are 0, or they are
                of a metric for which more is better.
        """
        scores.check_parent(library.parent_fingerprint)
        losses = self._quality_losses(library, scores)
        check_losses(library, losses, self.metric if self.window_metric is None else "the combined score")
        return losses

    def measured(self, library: Library, scores: Scores) -> tuple[tuple[Candidate, ...], ...]:
        """Return the candidates that may be searched: with `exclude` only those that were measured."""
        if self.unmeasured != "exclude":
            return library.layers
        return tuple(
            tuple(c for c in row if self._reason(scores, layer, c) is None) for layer, row in enumerate(library.layers)
        )

    def best_sets(self, library: Library, scores: Scores) -> Library:
        """Return the library with one set of experts for each number of a layer: of several, that of the least score.

        The others would only shift the normalization. Sets of which one has no score in `metric` are all left in.
        """
        return replace(library, layers=tuple(self._best_sets(scores, *row) for row in enumerate(library.layers)))

    def _best_sets(self, scores: Scores, layer: int, row: Sequence[Candidate]) -> tuple[Candidate, ...]:
        halves = {half: c.block.num_experts for c in row if (half := parts(c)[0]) is not None}
        worse = set[str]()
        for count in set(halves.values()):
            found = [scores.entries.get((layer, half), {}).get(self.metric) for half in halves if halves[half] == count]
            if all(found):
                least = min(one.mean for one in found if one is not None)
                names = [half for half in halves if halves[half] == count]
                best = next(name for name in names if scores.entries[layer, name][self.metric].mean == least)
                worse |= set(names) - {best}
        return tuple(c for c in row if parts(c)[0] not in worse)

    def _reason(self, scores: Scores, layer: int, candidate: Candidate) -> str | None:
        """Return why a candidate has no score of its own or of one of its halves; None where it has."""
        if self.window_metric is None and self.metric in scores.entries.get((layer, candidate.name), {}):
            return None
        for name, metric in zip(parts(candidate), (self.metric, self.window_metric or self.metric), strict=True):
            if name is not None and metric not in scores.entries.get((layer, name), {}):
                return scores.not_measured(layer, name, metric)
        return None

    def _quality_losses(self, library: Library, scores: Scores) -> list[list[float]]:
        if self.window_metric is None:
            return [[self._summed(scores, layer, c) for c in row] for layer, row in enumerate(library.layers)]
        rows = list(enumerate(library.layers))
        experts = _normalized([[self._part(scores, layer, c, 0) for c in row] for layer, row in rows])
        windows = _normalized([self._windows(scores, layer, row) for layer, row in rows])
        ties = _normalized([[self._tie_break(scores, layer, c) for c in row] for layer, row in rows])
        return [
            [(1 - self.balance) * e + self.balance * (w + TIE_BREAK * m) for e, w, m in zip(*grids)]
            for grids in zip(experts, windows, ties)
        ]

    def _windows(self, scores: Scores, layer: int, row: Sequence[Candidate]) -> list[float]:
        """Return w of every candidate; 0 for the parent's window."""
        drops = {c.block.window_tokens or 0: self._part(scores, layer, c, 1) for c in row if parts(c)[1] is not None}
        widest_first = sorted(drops, reverse=True)
        largest = dict(zip(widest_first, accumulate((drops[window] for window in widest_first), max)))
        return [0.0 if parts(c)[1] is None else max(0.0, largest[c.block.window_tokens or 0]) for c in row]

    def _tie_break(self, scores: Scores, layer: int, candidate: Candidate) -> float:
        """Return m: the window's score in `metric`; 0 where there is none."""
        name = parts(candidate)[1]
        if name is None or self.metric not in scores.entries[layer, name]:
            return 0.0
        return self._value(scores, layer, candidate, name, self.metric)

    def _summed(self, scores: Scores, layer: int, candidate: Candidate) -> float:
        if None not in parts(candidate) and self.metric in scores.entries.get((layer, candidate.name), {}):
            return self._value(scores, layer, candidate, candidate.name, self.metric)
        return self._part(scores, layer, candidate, 0) + self._part(scores, layer, candidate, 1)

    def _part(self, scores: Scores, layer: int, candidate: Candidate, part: int) -> float:
        name = parts(candidate)[part]
        if name is None:
            return 0.0
        metric = self.metric if part == 0 or self.window_metric is None else self.window_metric
        return self._value(scores, layer, candidate, name, metric)

    def _value(self, scores: Scores, layer: int, candidate: Candidate, name: str, metric: str) -> float:
        reason = (
            scores.not_measured(layer, name, metric) if metric not in scores.entries.get((layer, name), {}) else None
        )
        if reason is None:
            return _value(scores, layer, candidate, name, metric)
        if self.unmeasured == "zero":
            return 0.0
        raise ValueError(
            f"layer {layer}, candidate {candidate.name!r}: {name!r} has no {metric!r}, {reason}. Score it on data that "
            "can (longer sequences, or tokens routed to those experts), or set objective.unmeasured: exclude (or zero)."
        )


def _normalized(grid: list[list[float]]) -> list[list[float]]:
    """Return the grid divided by the sum of its per-layer maxima, or unchanged when that is 0."""
    scale = math.fsum(max(0.0, max(row)) for row in grid) or 1.0
    return [[value / scale for value in row] for row in grid]


def _value(scores: Scores, layer: int, candidate: Candidate, name: str, metric: str) -> float:
    where = f"layer {layer}, candidate {candidate.name!r}"
    metrics = scores.entries.get((layer, name))
    if metrics is None:
        raise ValueError(
            f"{where}: the scores have no entry {name!r} of this layer. Score this library with recipes/score.yaml, or "
            "remove the candidate from the library."
        )
    if metric not in metrics:
        raise ValueError(f"{where}: the scores have no metric {metric!r} of {name!r}; they have {sorted(metrics)}")
    value = metrics[metric].mean
    if not math.isfinite(value):
        raise ValueError(f"{where}: the score {metric!r} of {name!r} is {value}; score that candidate again")
    return value


def check_losses(library: Library, losses: Sequence[Sequence[float]], metric: str) -> None:
    """Check that losses order the candidates, and the right way round.

    Raises:
        ValueError: all are 0, or in every layer those with fewer experts have lower ones.
    """
    choices = [loss for row in losses if len(row) > 1 for loss in row[1:]]
    if choices and not any(choices):
        raise ValueError(
            f"every quality loss in {metric} is 0: all plans within the budgets would be equally good, and none the "
            "best. Score on data that can tell the candidates apart"
        )
    ordered = []
    for row, own in zip(library.layers, losses, strict=True):
        by_count = {c.block.num_experts: loss for c, loss in zip(row, own) if parts(c)[1] is None and c is not row[0]}
        if len(by_count) > 1 and by_count[min(by_count)] != by_count[max(by_count)]:
            ordered.append(by_count[min(by_count)] < by_count[max(by_count)])
    if len(ordered) > 1 and all(ordered):
        raise ValueError(
            f"in all {len(ordered)} layers the quality loss in {metric} falls with fewer experts: this is a score of "
            "which more is better, such as an accuracy. Give its drop, the parent's minus the candidate's"
        )
    if choices and max(choices) < 0:
        raise ValueError(
            f"every quality loss in {metric} is below 0, as if each replacement improved the parent; give losses, not "
            "gains"
        )
