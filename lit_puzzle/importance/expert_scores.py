"""Importance of each expert of one MoE layer, from one evaluation of the experts that a token is routed to.

Pure functions on tensors, and the scoring rules as small dataclasses. Reads and writes nothing.

Leave-one-out (arXiv 2602.11937 section 2): s_i = mean over all tokens of MSE(f(x), f_without_i(x)), where f_without_i
masks the router logit of expert i to -inf and repeats top-k and softmax. For one token with logits z, chosen experts C
(|C| = k), entrant r = argmax of z outside C, and expert outputs o_j:

    f           = sum_{j in C} p_j o_j,            p = softmax of z over C
    f_without_i = sum_{j in C - i + r} w_j o_j,    w = softmax of z over C - i + r    (f_without_i = f for i not in C)

so the k+1 outputs o_j, j in C + r, give every error exactly, and f itself as well. In the form (p - w_i) @ o the gates
are subtracted in float64, so that an expert with a tiny gate keeps its digits, which f - f_without_i would lose.
A layer whose every expert is chosen has no entrant: removing one leaves softmax over the k - 1 others; removing the
only expert of a layer leaves 0. Equal logits: the chosen are the router's own; of equal entrants the lowest index.

Memory for N tokens, D hidden, I intermediate, E experts, M = k + 1 evaluated, b bytes per number of the accumulating
dtype: b N M D (outputs) + b N k D (changes, squared in place) + 8 N (4 E + 4 k M) (logits, gates, indices)
+ the activations of the busiest expert, b n (2 D + 6 I) for its n <= N tokens.
Never a (tokens x experts x hidden) tensor; the caller bounds N.

Shapes: N tokens, E experts, K chosen per token, M = K or K + 1 evaluated per token, D hidden, I intermediate.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lit_puzzle.model.modules import ExpertWeights


@dataclass(frozen=True)
class RoutedTokens:
    """The routing of N tokens in one layer and the experts' outputs: the input of a scoring rule.

    Attributes:
        layer: index of the layer.
        num_experts: E of this layer.
        top_k: K of this layer: its experts per token, at most E.
        experts_NM: chosen experts in the router's order, then the entrant if it was evaluated.
        logits_NM: their router logits, float64.
        outputs_NMD: their outputs, before gating.
        counted_N: False for tokens that are not scored (padding); their values may be anything, even infinite.
    """

    layer: int
    num_experts: int
    top_k: int
    experts_NM: Tensor
    logits_NM: Tensor
    outputs_NMD: Tensor
    counted_N: Tensor


class ImportanceMethod(Protocol):
    """A scoring rule: numerators and denominators per expert, summed over tokens; score = numerator / denominator.

    Attributes:
        name: name of the rule in importance.json.
        needs_entrant: whether the (k+1)-th expert must be evaluated besides the chosen ones.
    """

    name: ClassVar[str]
    needs_entrant: ClassVar[bool]

    def sums(self, routed: RoutedTokens) -> tuple[Tensor, Tensor]:
        """Sum numerator and denominator over the counted tokens; both add up over batches and processes.

        Args:
            routed: the tokens of one layer.

        Returns:
            Two float64 tensors of shape E.
        """
        ...


@dataclass(frozen=True)
class LeaveOneOut:
    """The paper's score: mean over all tokens of the squared error that removing the expert causes."""

    name: ClassVar[str] = "leave_one_out"
    needs_entrant: ClassVar[bool] = True

    def sums(self, routed: RoutedTokens) -> tuple[Tensor, Tensor]:
        """Sum the errors of the chosen experts; every expert is divided by all counted tokens."""
        errors_NK = leave_one_out_errors(routed.logits_NM, routed.outputs_NMD, routed.top_k)
        return _sum_by_expert(errors_NK, routed), _tokens_for_each(routed)


@dataclass(frozen=True)
class Reap:
    """REAP (arXiv 2510.13999): mean over the tokens routed to the expert of gate weight x norm of its output."""

    name: ClassVar[str] = "reap"
    needs_entrant: ClassVar[bool] = False

    def sums(self, routed: RoutedTokens) -> tuple[Tensor, Tensor]:
        """Sum gate x norm; every expert is divided by the number of tokens routed to it."""
        gates_NK = torch.softmax(routed.logits_NM[:, : routed.top_k], dim=-1)
        norms_NK = torch.linalg.vector_norm(routed.outputs_NMD[:, : routed.top_k], dim=-1)
        return _sum_by_expert(gates_NK * norms_NK, routed), _sum_by_expert(torch.ones_like(gates_NK), routed)


@dataclass(frozen=True)
class Frequency:
    """Share of the tokens that are routed to the expert."""

    name: ClassVar[str] = "frequency"
    needs_entrant: ClassVar[bool] = False

    def sums(self, routed: RoutedTokens) -> tuple[Tensor, Tensor]:
        """Count the tokens routed to each expert; every expert is divided by all counted tokens."""
        return _sum_by_expert(torch.ones_like(routed.logits_NM[:, : routed.top_k]), routed), _tokens_for_each(routed)


@dataclass(frozen=True)
class Random:
    """Uniform scores in [0, 1) that depend on seed and layer only, never on the data: the baseline.

    Attributes:
        seed: seed of the scores.
    """

    seed: int = 0
    name: ClassVar[str] = "random"
    needs_entrant: ClassVar[bool] = False

    def sums(self, routed: RoutedTokens) -> tuple[Tensor, Tensor]:
        """Multiply the layer's random scores by the counted tokens, by which every expert is divided again."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + routed.layer)
        scores_E = torch.rand(routed.num_experts, generator=generator, dtype=torch.float64)
        tokens_E = _tokens_for_each(routed)
        return scores_E.to(tokens_E.device) * tokens_E, tokens_E


def entrants(logits_NE: Tensor, chosen_NK: Tensor) -> Tensor:
    """Return the expert that replaces a removed one: the best of the others, the lowest index among equals.

    Returns:
        Indices of shape (N, 1), or (N, 0) when every expert is chosen.
    """
    if chosen_NK.shape[1] == logits_NE.shape[1]:
        return chosen_NK[:, :0]
    others_NE = logits_NE.scatter(1, chosen_NK, float("-inf"))
    best_N1 = others_NE.amax(dim=1, keepdim=True)
    candidates_NE = (others_NE == best_N1).scatter_(1, chosen_NK, False)  # the others may be -inf as well
    return candidates_NE.to(torch.uint8).argmax(dim=1, keepdim=True)


def evaluate_experts(hidden_ND: Tensor, experts_NM: Tensor, weights: ExpertWeights, dtype: torch.dtype) -> Tensor:
    """Compute the outputs of the given experts for every token, one expert at a time over its tokens.

    Args:
        hidden_ND: inputs of the MoE layer.
        experts_NM: for each token the experts to evaluate.
        weights: the layer's experts; they are only indexed, never copied.
        dtype: dtype of the result. The projections run in the dtype of `hidden_ND`.

    Returns:
        Shape (N, M, D), before gating.
    """
    num_tokens, num_evaluated = experts_NM.shape
    outputs_SD = hidden_ND.new_empty((num_tokens * num_evaluated, hidden_ND.shape[1]), dtype=dtype)  # S = N M slots
    flat_S = experts_NM.reshape(-1)
    slots_by_expert_S = torch.argsort(flat_S, stable=True)
    sizes = torch.bincount(flat_S, minlength=weights.gate_up_EDF.shape[0]).tolist()
    for expert, slots_n in enumerate(slots_by_expert_S.split(sizes)):
        if len(slots_n) == 0:
            continue
        outputs_nD = weights.output(expert, hidden_ND[slots_n // num_evaluated])
        outputs_SD[slots_n] = outputs_nD.to(dtype)
    return outputs_SD.view(num_tokens, num_evaluated, -1)


def mixed_output(logits_NM: Tensor, outputs_NMD: Tensor, top_k: int) -> Tensor:
    """Compute the layer's own output f, shape (N, D): softmax over the chosen logits times their outputs."""
    gates_N1K = torch.softmax(logits_NM[:, None, :top_k], dim=-1).to(outputs_NMD.dtype)
    return torch.bmm(gates_N1K, outputs_NMD[:, :top_k]).squeeze(1)


def weights_without(logits_NM: Tensor, top_k: int) -> Tensor:
    """Compute the gates after removing each chosen expert in turn.

    Returns:
        Shape (N, K, M): row i is the softmax over all M but expert i; all 0 when no expert is left.
    """
    num_evaluated = logits_NM.shape[1]
    removed_KM = torch.eye(top_k, num_evaluated, dtype=torch.bool, device=logits_NM.device)
    left_NKM = logits_NM[:, None, :].masked_fill(removed_KM, float("-inf"))
    nothing_left_NK1 = (left_NKM == float("-inf")).all(dim=-1, keepdim=True)
    return torch.softmax(left_NKM, dim=-1).masked_fill(nothing_left_NK1, 0.0)


def leave_one_out_errors(logits_NM: Tensor, outputs_NMD: Tensor, top_k: int) -> Tensor:
    """Compute MSE(f, f_without_i) of every token and every expert chosen for it.

    Args:
        logits_NM: float64 router logits of the chosen experts, then of the entrant (none when every expert is chosen).
        outputs_NMD: outputs of the same experts.
        top_k: number K of chosen experts.

    Returns:
        Shape (N, K), the dtype of `outputs_NMD`; an expert that was not chosen has error 0 and no entry.
    """
    gates_NM = torch.softmax(logits_NM[:, :top_k], dim=-1)
    gates_NM = torch.nn.functional.pad(gates_NM, (0, logits_NM.shape[1] - top_k))
    change_NKM = (gates_NM[:, None, :] - weights_without(logits_NM, top_k)).to(outputs_NMD.dtype)
    return torch.bmm(change_NKM, outputs_NMD).square_().mean(dim=-1)


def mean_scores(numerator_E: Tensor, denominator_E: Tensor) -> Tensor:
    """Divide numerators by denominators, float64; 0 where the denominator is 0 (REAP of a never-routed expert)."""
    return torch.where(denominator_E > 0, numerator_E / denominator_E.clamp(min=1), 0.0)


def _sum_by_expert(values_NK: Tensor, routed: RoutedTokens) -> Tensor:
    # where, not a product with 0: the values of padding may be infinite
    values_NK = torch.where(routed.counted_N[:, None], values_NK.double(), 0.0)
    total_E = values_NK.new_zeros(routed.num_experts)
    return total_E.scatter_add_(0, routed.experts_NM[:, : routed.top_k].reshape(-1), values_NK.reshape(-1))


def _tokens_for_each(routed: RoutedTokens) -> Tensor:
    return routed.counted_N.sum().double().expand(routed.num_experts)
