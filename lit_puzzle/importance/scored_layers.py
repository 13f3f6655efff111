"""MoE layers that score their experts while they compute their output.

Reads and writes nothing. Formulas and scoring rules: `lit_puzzle.importance.expert_scores`.
Shapes: B sequences, T tokens, S = B T, D hidden, N tokens of one chunk, M evaluated experts per token, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_puzzle.importance.expert_scores import (
    ImportanceMethod,
    RoutedTokens,
    entrants,
    evaluate_experts,
    mixed_output,
)
from lit_puzzle.model.family import Family
from lit_puzzle.model.modules import expert_weights, model_family, moe_of, set_moe


class ScoredMoE(nn.Module):
    """Replaces the MoE layer of one decoder layer: the same output, and in addition the sums of a scoring rule.

    Args:
        moe: the layer; its parameters are neither moved nor copied.
        family: the model's family.
        layer: index of the decoder layer.
        method: the scoring rule.
        chunk_tokens: tokens evaluated at a time.
    """

    def __init__(self, moe: nn.Module, family: Family, layer: int, method: ImportanceMethod, chunk_tokens: int) -> None:
        super().__init__()
        self.moe = moe
        self._router_name = family.layer.router.removeprefix(f"{family.layer.moe}.")
        self.layer = layer
        self.method = method
        self.chunk_tokens = chunk_tokens
        self.counted_BT: Tensor | None = None  # set before each forward pass: which tokens are scored
        self.reset()

    def reset(self) -> None:
        """Set numerator and denominator of every expert to 0."""
        router = self.router
        self.sums_2E = torch.zeros(2, router.num_experts, dtype=torch.float64, device=router.weight.device)

    @property
    def router(self) -> Any:
        """The layer's router."""
        return self.moe.get_submodule(self._router_name)

    def forward(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and gates, as the MoE layer does."""
        assert self.counted_BT is not None
        hidden_SD = hidden_BTD.flatten(0, 1)
        chunks = zip(
            hidden_SD.split(self.chunk_tokens), self.counted_BT.flatten().split(self.chunk_tokens), strict=True
        )
        results = [self._score(hidden_ND, counted_N) for hidden_ND, counted_N in chunks]
        outputs, gates = zip(*results, strict=True)
        return torch.cat(outputs).view_as(hidden_BTD), torch.cat(gates)

    def _score(self, hidden_ND: Tensor, counted_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NE, gates_NK, experts_NM = self.router(hidden_ND)
        top_k = experts_NM.shape[1]
        if self.method.needs_entrant:
            experts_NM = torch.cat([experts_NM, entrants(logits_NE, experts_NM)], dim=1)
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        outputs_NMD = evaluate_experts(hidden_ND, experts_NM, expert_weights(self.moe), exact)
        logits_NM = logits_NE.gather(1, experts_NM).double()
        routed = RoutedTokens(self.layer, logits_NE.shape[1], top_k, experts_NM, logits_NM, outputs_NMD, counted_N)
        self.sums_2E = self.sums_2E + torch.stack(self.method.sums(routed))
        return mixed_output(logits_NM, outputs_NMD, top_k).to(hidden_ND.dtype), gates_NK


def score_layers(model: PreTrainedModel, method: ImportanceMethod, chunk_tokens: int) -> list[ScoredMoE]:
    """Replace the MoE layer of every decoder layer by a `ScoredMoE`, in place.

    Args:
        model: the parent.
        method: the scoring rule.
        chunk_tokens: tokens that a MoE layer evaluates at a time.

    Returns:
        One per layer; their sums grow with every forward pass of the model.
    """
    family, scored = model_family(model), []
    for index, decoder in enumerate(model.model.layers):
        scored.append(ScoredMoE(moe_of(decoder, family), family, index, method, chunk_tokens))
        set_moe(decoder, family, scored[-1])
    return scored


def check_finite(scored: Sequence[ScoredMoE], when: str) -> None:
    """Check that all sums so far are finite.

    Args:
        scored: layers.
        when: what was computed last, for the message.

    Raises:
        ValueError: some are not; names the first such layer.
    """
    broken = [layer for layer in scored if not bool(layer.sums_2E.isfinite().all())]
    if broken:
        raise ValueError(
            f"Scores of layer {broken[0].layer} are not finite after {when}. Check the parent for NaN weights, or load "
            f"it with more precision than {str(broken[0].router.weight.dtype).removeprefix('torch.')}."
        )
