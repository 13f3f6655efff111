"""Importance of experts in bfloat16 on this device: error against float32, order of the experts, time.

Leave-one-out scores of one MoE of gpt-oss's shape (32 experts top-4; 8 of 96 channels in `--small`), random
weights. The paper's pipeline runs 98M tokens through every layer: time is given per 1K tokens and layer.
"""

from collections.abc import Iterator

import torch
from part import Options, Row, milliseconds, peak_mib, relative_error, run
from torch import Tensor

from lit_puzzle.importance.expert_scores import LeaveOneOut, RoutedTokens, entrants, evaluate_experts
from lit_puzzle.model.modules import ExpertWeights, route

TOP_K = 4


def scores(hidden_ND: Tensor, router_ED: Tensor, weights: ExpertWeights, chosen_NK: Tensor) -> Tensor:
    """Return the score of every expert, with a routing that is the same in both precisions."""
    logits_NE = hidden_ND.double() @ router_ED.double().T
    experts_NM = torch.cat([chosen_NK, entrants(logits_NE, chosen_NK)], dim=1)
    outputs_NMD = evaluate_experts(hidden_ND, experts_NM, weights, torch.float32)
    counted_N = torch.ones(len(hidden_ND), dtype=torch.bool, device=hidden_ND.device)
    routed = RoutedTokens(
        layer=0,
        num_experts=len(router_ED),
        top_k=TOP_K,
        experts_NM=experts_NM,
        logits_NM=logits_NE.gather(1, experts_NM),
        outputs_NMD=outputs_NMD,
        counted_N=counted_N,
    )
    numerator_E, denominator_E = LeaveOneOut().sums(routed)
    return numerator_E / denominator_E


def work(options: Options) -> Iterator[Row]:
    """Score the same tokens in both precisions."""
    experts, channels, tokens = (8, 96, 200) if options.small else (32, 2880, 4096)
    device = options.device
    router_ED = torch.randn(experts, channels, device=device)
    hidden_ND = torch.randn(tokens, channels, device=device).bfloat16()
    shapes = (
        (experts, channels, 2 * channels),
        (experts, 2 * channels),
        (experts, channels, channels),
        (experts, channels),
    )
    random = [torch.randn(shape, device=device).mul_(channels**-0.5).bfloat16() for shape in shapes]
    _, chosen_NK = route(hidden_ND.double() @ router_ED.double().T, TOP_K)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        gate_up, gate_up_bias, down, down_bias = (x.to(dtype) for x in random)
        weights = ExpertWeights(gate_up, gate_up_bias, down, down_bias, alpha=1.702, limit=7.0)

        def score(weights: ExpertWeights = weights, dtype: torch.dtype = dtype) -> Tensor:
            return scores(hidden_ND.to(dtype), router_ED, weights, chosen_NK)

        found[dtype] = score()
        name = str(dtype).removeprefix("torch.")
        yield {"scores in": name, "tokens": tokens, "experts": experts} | {
            "ms_per_1k_tokens": round(milliseconds(score, device) / tokens * 1000, 3),
            "peak_mib": peak_mib(score, device),
        }
    exact, rounded = found[torch.float32], found[torch.bfloat16]
    order = exact.argsort()
    inverted = int((rounded[order].diff() < 0).sum())
    error = relative_error(rounded, exact)
    yield {"error of scores": error, "neighbors in another order": inverted, "ok": error < 0.02}


if __name__ == "__main__":
    run(work)
