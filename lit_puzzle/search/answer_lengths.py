"""Answer lengths in the search: requests a second instead of tokens a second.

A server's requests per second are its tokens per second over the tokens of an answer, so a block that makes answers
longer costs as much as one that is slower. With the length ratio L of a plan (child's mean tokens of an answer over the
parent's, over a mix of reasoning efforts), its seconds s for a round of requests and the bound K = R B G / (rho T):

    requests a second >= rho x the parent's    <=>    s(x) L(x) <= K

    s(x) = s_0 + sum over layers of s[l][x_l]         as in `lit_puzzle.search.limits`
    L(x) = 1 + sum over layers of d[l][x_l]           d: relative change with that block alone replaced, which an
                                                      evaluation measures in scoring (`<evaluation>/tokens/<effort>`)
    d    = sum over efforts of w_e (child's - parent's tokens) / sum over efforts of w_e (parent's tokens)

The product is no sum over layers. Its first-order form around a length L_k and the seconds K / L_k that it leaves is:

    P_k(x) = L_k s(x) + (K / L_k) L(x) - K  =  s(x) L(x) - (s(x) - K / L_k) (L(x) - L_k)

P_k(x) <= K says s <= the tangent of K / L at L_k, which lies below that curve (it is convex for L > 0): every plan that
holds it meets the budget. Each L_k is one more option of a deployment and batch size. L_k are the powers of `STEP`
between the shortest and the longest answers that can matter; a plan between two of them is lost only if it meets the
budget by less than a share (L / L_k - 1)^2 <= (STEP^.5 - 1)^2 = .04 %. So the optimum is proven up to that share.

How well changes add up is measured in docs/results.md. A sum of changes may leave no answer at all (L <= 0), where the
tangents say nothing: every plan has L >= `SHORTEST`, one more limit. Reads and writes nothing. Source: arXiv 2602.11937
(request rate).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_puzzle.environments.environment import effort_weights
from lit_puzzle.library.library import Candidate, parts
from lit_puzzle.scoring.scores import Scores
from lit_puzzle.search.objective import Unmeasured
from lit_puzzle.search.solver.choices import Grid, Limit, Option

REQUESTS, ANSWERS = "requests_over_parent", "answer_length"  # keys of limits
STEP = 1.04
SHORTEST = 0.25  # of the parent's answers
TOKENS = "/tokens/"  # EVALUATION/tokens/EFFORT


@dataclass(frozen=True)
class AnswerLengths:
    """How much longer than the parent's each candidate makes answers, alone, over one mix of efforts.

    Attributes:
        changes: relative change of each candidate of each layer; infinite for one that may not be chosen.
    """

    changes: Grid

    def ratio(self, chosen: Sequence[int]) -> float:
        """Return the predicted length of a plan's answers over that of the parent's."""
        return math.fsum([1.0, *(row[index] for row, index in zip(self.changes, chosen))])

    def levels(self, most: float) -> list[float]:
        """Return the lengths around which the product is taken, at most `most`, the longest that can meet the budget.

        At least one is returned, so that a search without any plan can say what is missing.
        """
        finite = [[change for change in row if change < math.inf] for row in self.changes]
        lowest = max(SHORTEST, 1 + sum(min(row, default=0.0) for row in finite))
        highest = max(lowest, min(most, 1 + sum(max(row, default=0.0) for row in finite)))
        first, last = math.log(lowest, STEP), math.log(highest, STEP)
        return [STEP**power for power in range(math.floor(first), math.ceil(last) + 1)]


def product(seconds: float, ratio: float, level: float, bound: float) -> float:
    """Return P_k of the head of this file."""
    return level * seconds + bound / level * ratio - bound


def by_length(option: Option, lengths: AnswerLengths | None) -> list[tuple[Option, float]]:
    """Return an option of a target around each length of answers, with the length.

    Args:
        option: its limit on requests is that of a plan whose answers are as long as the parent's.
        lengths: changes of lengths; None: they are not known, or requests are not bounded.
    """
    seconds = next((limit for limit in option.limits if limit.key == REQUESTS), None)
    if lengths is None or seconds is None:
        return [(option, 1.0)]
    others = tuple(limit for limit in option.limits if limit is not seconds)
    least = not_shorter(lengths)
    fastest = seconds.constant + sum(map(min, seconds.coefficients))
    return [
        (
            Option(
                f"{option.name}, answers {level:.2f} times as long", (*others, _around(seconds, lengths, level), least)
            ),
            level,
        )
        for level in lengths.levels(seconds.bound / fastest)
    ]


def _around(seconds: Limit, lengths: AnswerLengths, level: float) -> Limit:
    """Return the limit on the product of seconds and length, around one length.

    Args:
        seconds: the limit on seconds of a plan whose answers are as long as the parent's.
        lengths: changes of length.
        level: length around which the product is taken.
    """
    bound = seconds.bound
    coefficients = tuple(
        tuple(level * own + bound / level * change for own, change in zip(row, changes, strict=True))
        for row, changes in zip(seconds.coefficients, lengths.changes, strict=True)
    )
    constant = product(seconds.constant, 1.0, level, bound)
    return Limit(seconds.name, coefficients, constant, bound, seconds.key, seconds.numerator)


def not_shorter(lengths: AnswerLengths) -> Limit:
    """Return L >= `SHORTEST`, as the upper bound 2 - L <= 2 - `SHORTEST`."""
    shortening = tuple(tuple(-change if change < math.inf else 0.0 for change in row) for row in lengths.changes)
    return Limit(f"answers at least {SHORTEST} times as long", shortening, 1.0, 2 - SHORTEST, ANSWERS, hard=True)


def answer_lengths(
    layers: Sequence[Sequence[Candidate]],
    scores: Scores,
    efforts: Mapping[str, float] | None,
    evaluation: str | None,
    unmeasured: Unmeasured,
) -> AnswerLengths:
    """Read the changes of answer lengths from scores.

    Args:
        layers: the candidates, the parent's own first in each layer.
        scores: scores of the library.
        efforts: weight of each effort; None: all that were measured, equally.
        evaluation: which evaluation measured them; None: the only one that has.
        unmeasured: what to do about candidates whose items could tell nothing.

    Raises:
        ValueError: no evaluation, or several, measured lengths, or not at these efforts, or not of every candidate.
    """
    name = _evaluation(scores, evaluation)
    measured = [key.removeprefix(name + TOKENS) for key in scores.parent if key.startswith(name + TOKENS)]
    weights = effort_weights(measured if efforts is None else efforts)
    if missing := sorted(set(weights) - set(measured)):
        raise ValueError(
            f"efforts {missing} were given, but {name!r} measured answers at {measured} only; score them too"
        )
    tokens = sum(weight * scores.parent[f"{name}{TOKENS}{effort}"] for effort, weight in weights.items())

    def of_half(layer: int, half: str) -> float:
        metrics = scores.entries.get((layer, half), {})
        keys = [f"{name}{TOKENS}{effort}" for effort in weights]
        if all(key in metrics for key in keys):
            return sum(weights[key.rpartition("/")[2]] * metrics[key].mean for key in keys) / tokens
        if scores.could_tell.get((layer, half), {}).get(name) == 0.0 and unmeasured != "refuse":
            return 0.0 if unmeasured == "zero" else math.inf
        raise ValueError(
            f"requests_over_parent: layer {layer}, {half!r} has no {keys[0]!r}. Score it with scoring.evaluate: all, "
            "on items longer than its window."
        )

    def change(layer: int, candidate: Candidate) -> float:
        if (layer, candidate.name) in scores.entries:
            return of_half(layer, candidate.name)
        return sum(of_half(layer, half) for half in parts(candidate) if half is not None)

    return AnswerLengths(tuple(tuple(change(layer, c) for c in row) for layer, row in enumerate(layers)))


def _evaluation(scores: Scores, given: str | None) -> str:
    """Return the evaluation that measured answer lengths."""
    found = list(dict.fromkeys(key.partition(TOKENS)[0] for key in scores.parent if TOKENS in key))
    if given in found:
        return str(given)
    if given is None and len(found) == 1:
        return found[0]
    wanted = "one that decodes answers" if given is None else repr(given)
    raise ValueError(
        f"requests_over_parent needs answer lengths of {wanted}; the scores have those of {found}. Score with such an "
        "evaluation and scoring.evaluate: all, or name it in constraints.lengths_by."
    )
