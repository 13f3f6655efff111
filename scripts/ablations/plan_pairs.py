"""Do pairs of blocks say more about a child than the sum of its blocks? The random plans of plan_scores.py again.

    python scripts/ablations/plan_pairs.py [--plans 120] [--seed 0] [--folder runs/plan_scores]

A plan replaces a set H of halves of blocks (experts or window of a layer). Its summed score is S = sum of s_h, h in H.

    measured pairs  S + c sum over pairs {g, h} of H of (s_gh - s_g - s_h), c = 1 or 1/2; s_gh is the KL with both
                    replaced in the parent. All of them, and only those of neighbouring or of the same layer.
    fitted layers   a + b S + sum over layers of w_l t_l, t_l the part of S that is of layer l
    fitted pairs    a + b S + sum over pairs of layers of w_lm t_l t_m

Fitted on a random half of the plans (a and b by least squares, w by ridge on what is left, its strength by
leave-one-out) and tested on the other half, 200 times. Printed are rank correlations (Spearman) with the KL of the
children, nothing trained: of measured pairs over all plans, of fits over the tested halves, with the share of them in
which the fit orders better than S. KL of pairs and of children is over completions of the parent, on 64 sequences that
blocks were scored on, and on 64 others of them, the mean over tokens; the first row sums means over sequences of their
means, as the scores have them.
"""

import argparse
import json
import os
import random
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from plan_scores import OBJECTIVES, correlation, prepare, random_plan  # type: ignore[import-not-found]  # beside this
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from lit_puzzle.data.calibration import pad_right
from lit_puzzle.library.library import Library, parts
from lit_puzzle.library.swap import swapped
from lit_puzzle.model.blocks import with_own_blocks
from lit_puzzle.model.loading import load_model

SEQUENCES, SPLITS = 64, 200
STRENGTHS = np.logspace(-2, 4, 25)
Half = tuple[int, str]  # layer, experts=N or window=W
Vector = NDArray[np.float64]


class Replaced:
    """The parent with halves of its blocks replaced.

    Args:
        library: the library.
        lines: JSON of the token ids of sequences and the number of those that are the prompt's.
    """

    def __init__(self, library: Library, lines: Sequence[str]) -> None:
        self.library = library
        self.model = with_own_blocks(load_model(Path("lit_puzzle/assets/tiny_parent"), "float32", "sink_attention"))
        rows = [json.loads(line) for line in lines]
        self.ids_BT = pad_right([row["input_ids"] for row in rows])["input_ids"]
        self.counted_BT = torch.zeros_like(self.ids_BT, dtype=torch.bool)
        for counted_T, row in zip(self.counted_BT, rows, strict=True):
            counted_T[row["prompt_tokens"] - 1 : len(row["input_ids"]) - 1] = True
        self.log_p_NV = self._log_probabilities()

    @torch.inference_mode()
    def _log_probabilities(self) -> torch.Tensor:
        states_BTD = self.model.model(input_ids=self.ids_BT, use_cache=False).last_hidden_state
        logits_NV: torch.Tensor = self.model.lm_head(states_BTD[self.counted_BT])
        return logits_NV.double().log_softmax(-1)

    def kl(self, halves: Sequence[Half], by_sequence: bool = False) -> float:
        """Return KL(parent, replaced) in nats per token: the mean over tokens, or over the means of sequences."""
        with ExitStack() as stack:
            for layer in {layer for layer, _ in halves}:
                name = ",".join(sorted(half for place, half in halves if place == layer))
                stack.enter_context(swapped(self.model, layer, self.library.candidate(layer, name).block))
            log_q_NV = self._log_probabilities()
        kl_N = (self.log_p_NV.exp() * (self.log_p_NV - log_q_NV)).sum(-1)
        sequences = kl_N.split(self.counted_BT.sum(1).tolist())
        return float(torch.stack([kl_T.mean() for kl_T in sequences]).mean() if by_sequence else kl_N.mean())


def halves_of(library: Library, plan: Sequence[str]) -> list[Half]:
    """Return the halves that a plan replaces."""
    rows = [(layer, half) for layer, name in enumerate(plan) for half in parts(library.candidate(layer, name))]
    return [(layer, half) for layer, half in rows if half is not None]


def pair_losses(parent: Replaced, plans: Sequence[Sequence[Half]]) -> dict[frozenset[Half], float]:
    """Return the KL of every half of the plans, and of every two that one plan replaces."""
    sets = {frozenset(pair) for plan in plans for n in (1, 2) for pair in combinations(plan, n)}
    return {one: parent.kl(sorted(one)) for one in sets}


def measured_pairs(halves: Sequence[Half], losses: dict[frozenset[Half], float], apart: int, share: float) -> float:
    """Return the sum of a plan, with pairs that are at most so many layers apart."""
    total = sum(losses[frozenset([half])] for half in halves)
    for one, other in combinations(halves, 2):
        if abs(one[0] - other[0]) <= apart:
            both = losses[frozenset([one, other])]
            total += share * (both - losses[frozenset([one])] - losses[frozenset([other])])
    return total


def ridge(features_NF: Vector, values_N: Vector) -> Vector:
    """Return the weights of a ridge regression through 0, its strength by leave-one-out."""

    def solve(strength: float) -> tuple[float, Vector]:
        inverse = np.linalg.inv(features_NF.T @ features_NF + strength * np.eye(features_NF.shape[1])) @ features_NF.T
        weights = inverse @ values_N
        left_out = (values_N - features_NF @ weights) / (1 - np.einsum("nf,fn->n", features_NF, inverse))
        return float(np.square(left_out).mean()), weights

    return min(map(solve, STRENGTHS), key=lambda found: found[0])[1]


def compare(
    sums_N: Vector, features_NF: Vector, true_N: Vector, draws: np.random.Generator
) -> tuple[float, float, float]:
    """Return mean rank correlations of the sum and of the fit over tested halves, and how often the fit's is larger."""
    found = []
    for _ in range(SPLITS):
        order = draws.permutation(len(true_N))
        own, tested = order[: len(order) // 2], order[len(order) // 2 :]
        slope, start = np.polyfit(sums_N[own], true_N[own], 1)
        centre, spread = features_NF[own].mean(0), features_NF[own].std(0) + 1e-12
        scaled_NF = (features_NF - centre) / spread
        weights = ridge(scaled_NF[own], true_N[own] - slope * sums_N[own] - start)
        fitted = slope * sums_N[tested] + scaled_NF[tested] @ weights
        found.append([spearmanr(x, true_N[tested]).statistic for x in (sums_N[tested], fitted)])
    plain, fitted_too = np.array(found).T
    return float(plain.mean()), float(fitted_too.mean()), float((fitted_too > plain).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/plan_scores"))
    given = parser.parse_args()
    library, scores = prepare(given.folder, given.seed)
    generator, plans = random.Random(given.seed), list[tuple[str, ...]]()
    while len(plans) < given.plans:
        drawn = random_plan(library, generator)
        plans += [drawn] if drawn not in plans else []
    lines = (given.folder / "score" / "calibration.jsonl").read_text().splitlines()
    halves = [halves_of(library, plan) for plan in plans]
    parent = Replaced(library, lines[:SEQUENCES])
    losses = pair_losses(parent, halves)
    by_sequence = {one: parent.kl(sorted(one), by_sequence=True) for one in losses if len(one) == 1}
    others = Replaced(library, lines[SEQUENCES : 2 * SEQUENCES])
    true_N, true_by_sequence_N = (np.array([others.kl(one, way) for one in halves]) for way in (False, True))
    print(f"{sum(len(one) == 2 for one in losses)} pairs; KL {true_N.min():.3f} to {true_N.max():.3f}")
    print("| measured | rank correlation | with means of sequences | mean predicted / true |\n|---|---|---|---|")
    for what, found, apart, share in (
        ("sum, means of sequences", by_sequence, -1, 0.0),
        ("sum", losses, -1, 0.0),
        ("all pairs", losses, 9, 1.0),
        ("all, half", losses, 9, 0.5),
        ("neighbours", losses, 1, 1.0),
    ):
        sums_N = np.array([measured_pairs(one, found, apart, share) for one in halves])
        cells = [correlation(list(sums_N), list(one_N)) for one_N in (true_N, true_by_sequence_N)]
        print(f"| {what} | {' | '.join(cells)} | {(sums_N / true_N).mean():.2f} |")
    print("| score | fitted | sum | fit | fit is better in |\n|---|---|---|---|---|")
    for name in ("kl", "hidden_mse", "kl, windows by long context"):
        grid = OBJECTIVES[name].quality_losses(library, scores)
        places = [{one.name: place for place, one in enumerate(candidates)} for candidates in library.layers]
        terms_NL = np.array([[grid[n][places[n][one]] for n, one in enumerate(plan)] for plan in plans])
        products_PN = np.stack([terms_NL[:, a] * terms_NL[:, b] for a, b in combinations(range(terms_NL.shape[1]), 2)])
        for what, features_NF in (("layers", terms_NL), ("pairs", products_PN.T)):
            plain, fitted, better = compare(terms_NL.sum(1), features_NF, true_N, np.random.default_rng(given.seed))
            print(f"| {name} | {what} | {plain:.3f} | {fitted:.3f} | {better:.0%} |")


if __name__ == "__main__":
    main()
