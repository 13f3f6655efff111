"""Requests of a parent and its child on the same prompts: settings of both, and intervals of every number.

A cluster is a prompt: its samples at all efforts, by both models, are drawn again together, so that what a hard prompt
does to both of them cancels. Prompts are drawn within their task. The intervals are percentiles of the bootstrap; most
numbers here are ratios, whose errors no formula for means gives.

Reads and writes nothing; imports no torch.
Source: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13; arXiv 2411.00640,
section 2.2 (samples of a prompt belong together).

Shapes: M models (parent, child), E efforts, Q quantities (requests, correct, tokens), G prompts of a task.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap  # type: ignore[import-untyped]

from lit_puzzle.environments.environment import LEVELS
from lit_puzzle.environments.episodes import Episode
from lit_puzzle.report.request_rates import RESAMPLES_AT_A_TIME, Model, Setting

Sums = NDArray[np.float64]
Numbers = Mapping[str, float]


@dataclass(frozen=True)
class PairedRequests:
    """What a parent and its child did on the same prompts.

    Attributes:
        efforts: in the order low, medium, high.
        sums_MEQG: task -> sums over the samples of each prompt.
    """

    efforts: tuple[str, ...]
    sums_MEQG: Mapping[str, Sums]

    def models(self, throughputs: Sequence[float], chosen: Mapping[str, NDArray[np.int_]] | None = None) -> list[Model]:
        """Return parent and child.

        Args:
            throughputs: theirs, in generated tokens per second.
            chosen: task -> prompts to count, each as often as it is named; None: each once.
        """
        totals = {
            task: (sums if chosen is None else sums[..., chosen[task]]).sum(-1) for task, sums in self.sums_MEQG.items()
        }
        return [
            Model(
                {
                    effort: _setting({t: sums[m, e] for t, sums in totals.items()})
                    for e, effort in enumerate(self.efforts)
                },
                throughput,
            )
            for m, throughput in enumerate(throughputs)
        ]


def _setting(totals_Q: Mapping[str, Sums]) -> Setting:
    """Return means over the requests of each task; of the tokens their mean over tasks."""
    asked = {task: sums for task, sums in totals_Q.items() if sums[0] > 0}
    tokens = [float(sums[2] / sums[0]) for sums in asked.values()]
    return Setting({task: float(sums[1] / sums[0]) for task, sums in asked.items()}, sum(tokens) / len(tokens))


def pair(parent: Sequence[Episode], child: Sequence[Episode]) -> PairedRequests:
    """Bring the requests of two evaluations together.

    Raises:
        ValueError: they are not of the same prompts, as often asked, in the same order; or a task has one prompt only.
    """
    asked = [[(e.environment, e.effort, e.problem) for e in episodes] for episodes in (parent, child)]
    if asked[0] != asked[1]:
        raise ValueError(
            f"{len(parent)} requests of the parent and {len(child)} of the child are not of the same prompts in the "
            "same order. Evaluate both with the same held_out."
        )
    efforts = tuple(effort for effort in LEVELS if any(effort == episode.effort for episode in parent))
    found: dict[str, Sums] = {}
    for task in sorted({episode.environment for episode in parent}):
        prompts = list(dict.fromkeys(e.problem for e in parent if e.environment == task))
        if len(prompts) < 2:
            raise ValueError(f"Task {task} has one prompt only: an interval needs two. Ask more prompts per effort.")
        place = {problem: number for number, problem in enumerate(prompts)}
        sums = np.zeros((2, len(efforts), 3, len(prompts)))
        for m, episodes in enumerate((parent, child)):
            for e in (e for e in episodes if e.environment == task):
                sums[m, efforts.index(e.effort), :, place[e.problem]] += (1.0, e.correct, float(e.generated_tokens))
        found[task] = sums
    return PairedRequests(efforts, found)


def intervals(
    requests: PairedRequests,
    throughputs: Sequence[float],
    numbers: Callable[[Model, Model], Numbers],
    resamples: int,
    seed: int,
    confidence: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Return the bootstrap interval of each number that exists in every resample.

    Args:
        requests: of parent and child.
        throughputs: theirs, which count as exact.
        numbers: what is computed from parent and child.
        resamples: how often the prompts are drawn again.
        seed: of the drawing.
        confidence: probability that an interval aims at.
    """
    tasks = list(requests.sums_MEQG)
    names = list(numbers(*requests.models(throughputs)))

    def statistic(*drawn: NDArray[np.int_], axis: int = -1) -> NDArray[np.float64]:
        assert axis == -1
        rows = (dict(zip(tasks, row, strict=True)) for row in _rows(drawn))
        found = [numbers(*requests.models(throughputs, row)) for row in rows]
        values = np.array([[one.get(name, np.nan) for one in found] for name in names])
        return values if drawn[0].ndim > 1 else values[:, 0]

    drawn = [np.arange(sums.shape[-1]) for sums in requests.sums_MEQG.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # a number may be the same in every resample
        found = bootstrap(
            drawn,
            statistic,
            n_resamples=resamples,
            batch=RESAMPLES_AT_A_TIME,
            vectorized=True,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    bounds = zip(names, found.low, found.high, strict=True)
    return {name: (float(low), float(high)) for name, low, high in bounds if np.isfinite([low, high]).all()}


def _rows(drawn: Sequence[NDArray[np.int_]]) -> Iterable[Sequence[NDArray[np.int_]]]:
    return zip(*(np.atleast_2d(part) for part in drawn), strict=True)
