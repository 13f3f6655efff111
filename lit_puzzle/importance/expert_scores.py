"""How much each expert of one MoE layer matters, from one evaluation of the experts a token is routed to.

Reads and writes nothing: pure functions on tensors, and the scoring rules as small dataclasses.

Leave-one-out (arXiv 2602.11937 section 2): s_i = mean over all tokens of MSE(f(x), f_without_i(x)), where f_without_i
masks the router logit of expert i to -inf and repeats top-k and softmax. For one token with logits z, chosen experts C
(|C| = k), entrant r = argmax of z outside C, and expert outputs o_j:

    f           = sum_{j in C} p_j o_j,            p = softmax of z over C
    f_without_i = sum_{j in C - i + r} w_j o_j,    w = softmax of z over C - i + r    (f_without_i = f for i not in C)

so the k+1 outputs o_j, j in C + r, give every error exactly, and f itself as well. In the form (p - w_i) @ o the gates
are subtracted in float64, so a rarely visible expert keeps its digits where f - f_without_i would lose them.
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


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of one layer, stored as gpt-oss does (gate and up interleaved in the last dimension).

    Attributes:
        gate_up_EDF: First projection, F = 2 I.
        gate_up_bias_EF: Its bias.
        down_EID: Second projection.
        down_bias_ED: Its bias.
        alpha: Slope inside the gate's sigmoid.
        limit: Clamp of gate (above) and up (both sides).
    """

    gate_up_EDF: Tensor
    gate_up_bias_EF: Tensor
    down_EID: Tensor
    down_bias_ED: Tensor
    alpha: float
    limit: float


@dataclass(frozen=True)
class RoutedTokens:
    """What one layer did with N tokens, all that a scoring rule may look at.

    Attributes:
        layer: Index of the layer.
        num_experts: E of this layer.
        top_k: K of this layer: its experts per token, at most E.
        experts_NM: Chosen experts in the router's order, then the entrant if it was evaluated.
        logits_NM: Their router logits, float64.
        outputs_NMD: Their outputs, before gating.
        counted_N: False for tokens that are not scored (padding); their numbers may be anything.
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
        name: Written to importance.json.
        needs_entrant: Whether the (k+1)-th expert must be evaluated beside the chosen ones.
    """

    name: ClassVar[str]
    needs_entrant: ClassVar[bool]

    def sums(self, routed: RoutedTokens) -> tuple[Tensor, Tensor]:
        """Numerator and denominator, float64, shape E each, over counted tokens; they add up over batches and ranks."""
        ...


@dataclass(frozen=True)
class LeaveOneOut:
    """The paper's score: mean over all tokens of the squared error that removing the expert causes."""

    name: ClassVar[str] = "leave_one_out"
    needs_entrant: ClassVar[bool] = True

    def sums(self, routed: RoutedTokens) -> tuple[Tensor, Tensor]:
        """Summed errors of the chosen experts; all counted tokens for every expert."""
        errors_NK = leave_one_out_errors(routed.logits_NM, routed.outputs_NMD, routed.top_k)
        return _sum_by_expert(errors_NK, routed), _tokens_for_each(routed)


@dataclass(frozen=True)
class Reap:
    """REAP (arXiv 2510.13999): mean over the tokens routed to the expert of gate weight x norm of its output."""

    name: ClassVar[str] = "reap"
    needs_entrant: ClassVar[bool] = False

    def sums(self, routed: RoutedTokens) -> tuple[Tensor, Tensor]:
        """Summed gate x norm; the number of tokens routed to each expert."""
        gates_NK = torch.softmax(routed.logits_NM[:, : routed.top_k], dim=-1)
        norms_NK = torch.linalg.vector_norm(routed.outputs_NMD[:, : routed.top_k], dim=-1)
        return _sum_by_expert(gates_NK * norms_NK, routed), _sum_by_expert(torch.ones_like(gates_NK), routed)


@dataclass(frozen=True)
class Frequency:
    """Share of the tokens that are routed to the expert."""

    name: ClassVar[str] = "frequency"
    needs_entrant: ClassVar[bool] = False

    def sums(self, routed: RoutedTokens) -> tuple[Tensor, Tensor]:
        """Routed tokens per expert; all counted tokens for every expert."""
        return _sum_by_expert(torch.ones_like(routed.logits_NM[:, : routed.top_k]), routed), _tokens_for_each(routed)


@dataclass(frozen=True)
class Random:
    """Uniform scores in [0, 1) that depend on seed and layer only, never on the data: the baseline.

    Attributes:
        seed: Another seed, another order of experts.
    """

    seed: int = 0
    name: ClassVar[str] = "random"
    needs_entrant: ClassVar[bool] = False

    def sums(self, routed: RoutedTokens) -> tuple[Tensor, Tensor]:
        """The layer's random scores times the tokens; all counted tokens for every expert."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + routed.layer)
        scores_E = torch.rand(routed.num_experts, generator=generator, dtype=torch.float64)
        tokens_E = _tokens_for_each(routed)
        return scores_E.to(tokens_E.device) * tokens_E, tokens_E


def entrants(logits_NE: Tensor, chosen_NK: Tensor) -> Tensor:
    """The expert that comes in when a chosen one is removed: the best of the others, the lowest index of equals.

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
    """Outputs of the named experts for every token, one expert at a time over the tokens it serves.

    Args:
        hidden_ND: Inputs of the MoE layer.
        experts_NM: For each token the experts to evaluate.
        weights: The layer's experts; they are only indexed, never copied.
        dtype: Of the result. The projections run in the dtype of `hidden_ND`.

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
        inputs_nD = hidden_ND[slots_n // num_evaluated]
        gate_up_nF = torch.addmm(weights.gate_up_bias_EF[expert], inputs_nD, weights.gate_up_EDF[expert])
        gated_nI = _clamped_swiglu(gate_up_nF, weights.alpha, weights.limit)
        outputs_nD = torch.addmm(weights.down_bias_ED[expert], gated_nI, weights.down_EID[expert])
        outputs_SD[slots_n] = outputs_nD.to(dtype)
    return outputs_SD.view(num_tokens, num_evaluated, -1)


def _clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """gpt-oss's activation, (up + 1) x gate x sigmoid(alpha gate), on interleaved gate and up."""
    gate_nI = gate_up[:, ::2].clamp(max=limit)
    up_nI = gate_up[:, 1::2].clamp(-limit, limit)
    return (gate_nI * alpha).sigmoid_().mul_(gate_nI).mul_(up_nI.add_(1))


def mixed_output(logits_NM: Tensor, outputs_NMD: Tensor, top_k: int) -> Tensor:
    """The layer's own output f, shape (N, D): softmax over the chosen logits times their outputs."""
    gates_N1K = torch.softmax(logits_NM[:, None, :top_k], dim=-1).to(outputs_NMD.dtype)
    return torch.bmm(gates_N1K, outputs_NMD[:, :top_k]).squeeze(1)


def weights_without(logits_NM: Tensor, top_k: int) -> Tensor:
    """Mixing weights after removing each chosen expert in turn.

    Returns:
        Shape (N, K, M): row i is the softmax over all M but expert i; 0 everywhere when nothing is left.
    """
    num_evaluated = logits_NM.shape[1]
    removed_KM = torch.eye(top_k, num_evaluated, dtype=torch.bool, device=logits_NM.device)
    left_NKM = logits_NM[:, None, :].masked_fill(removed_KM, float("-inf"))
    nothing_left_NK1 = (left_NKM == float("-inf")).all(dim=-1, keepdim=True)
    return torch.softmax(left_NKM, dim=-1).masked_fill(nothing_left_NK1, 0.0)


def leave_one_out_errors(logits_NM: Tensor, outputs_NMD: Tensor, top_k: int) -> Tensor:
    """MSE(f, f_without_i) of every token and every expert chosen for it.

    Args:
        logits_NM: Float64 router logits of the chosen experts, then of the entrant (none when every expert is chosen).
        outputs_NMD: Outputs of the same experts.
        top_k: Number K of chosen experts.

    Returns:
        Shape (N, K), the dtype of `outputs_NMD`; an expert that was not chosen has error 0 and no entry.
    """
    gates_NM = torch.softmax(logits_NM[:, :top_k], dim=-1)
    gates_NM = torch.nn.functional.pad(gates_NM, (0, logits_NM.shape[1] - top_k))
    change_NKM = (gates_NM[:, None, :] - weights_without(logits_NM, top_k)).to(outputs_NMD.dtype)
    return torch.bmm(change_NKM, outputs_NMD).square_().mean(dim=-1)


def mean_scores(numerator_E: Tensor, denominator_E: Tensor) -> Tensor:
    """Scores, float64; 0 for an expert that nothing was counted for (REAP of a never-routed expert)."""
    return torch.where(denominator_E > 0, numerator_E / denominator_E.clamp(min=1), 0.0)


def _sum_by_expert(values_NK: Tensor, routed: RoutedTokens) -> Tensor:
    # where, not a product with 0: what padding holds may be infinite
    values_NK = torch.where(routed.counted_N[:, None], values_NK.double(), 0.0)
    total_E = values_NK.new_zeros(routed.num_experts)
    return total_E.scatter_add_(0, routed.experts_NM[:, : routed.top_k].reshape(-1), values_NK.reshape(-1))


def _tokens_for_each(routed: RoutedTokens) -> Tensor:
    return routed.counted_N.sum().double().expand(routed.num_experts)
