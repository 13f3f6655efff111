"""Functions on the modules of a loaded model: its parts by the names of its family, its router and its experts.

Reads and writes nothing; weights are not copied. transformers' modules have no types, so the accessors return `Any`.

    route          gates = softmax over the top k of the logits
    experts        down(a) + down_bias,  a = (up + 1) gate sigmoid(alpha gate),  [gate, up] = gate_up(x) + gate_up_bias,
                   gate <= limit, -limit <= up <= limit; gate and up interleaved

Source: transformers' `modeling_gpt_oss.py`.
Shapes: N tokens, D hidden channels, E experts, K experts per token, I channels inside an expert, F = 2 I.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_puzzle.model.family import Family, family_named

RouterOutput = tuple[Tensor, Tensor, Tensor]  # logits (N, E), gates (N, K), chosen experts (N, K)


def model_family(model: PreTrainedModel) -> Family:
    """Return the family of a loaded model.

    Raises:
        ValueError: its model type belongs to no family.
    """
    return family_named(model.config.model_type)


def decoder_layer(model: PreTrainedModel, layer: int) -> Any:
    """Return a decoder layer."""
    return model.model.layers[layer]


def attention_of(decoder: nn.Module, family: Family) -> Any:
    """Return the attention of a decoder layer; its `sliding_window` is its window in tokens, or None."""
    return decoder.get_submodule(family.layer.attention)


def router_of(decoder: nn.Module, family: Family) -> Any:
    """Return the router of a decoder layer, with `num_experts` and `top_k`; it returns a `RouterOutput`."""
    return decoder.get_submodule(family.layer.router)


def moe_of(decoder: nn.Module, family: Family) -> Any:
    """Return the MoE layer of a decoder layer, (B, T, D) -> output (B, T, D) and gates."""
    return decoder.get_submodule(family.layer.moe)


def set_moe(decoder: nn.Module, family: Family, moe: nn.Module) -> None:
    """Put another module in the place of the MoE layer of a decoder layer."""
    decoder.set_submodule(family.layer.moe, moe)


def route(logits_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose experts as the router does.

    Returns:
        Gates (N, K) and chosen experts (N, K), in the order of their logits.
    """
    best_NK, experts_NK = torch.topk(logits_NE, top_k, dim=-1)
    return torch.softmax(best_NK, dim=-1, dtype=best_NK.dtype), experts_NK


@contextmanager
def restricted(router: Any, kept: Sequence[int]) -> Iterator[None]:
    """Let a router choose among the experts `kept` only: exactly the routing of a layer that has no others.

    Args:
        router: of a decoder layer, see `router_of`.
        kept: indices of experts, at least one.
    """
    removed_E = torch.ones(router.num_experts, dtype=torch.bool, device=router.weight.device)
    removed_E[list(kept)] = False
    top_k = min(router.top_k, len(kept))

    def restrict(_router: Any, _inputs: Any, output: RouterOutput) -> RouterOutput:
        logits_NE = output[0].masked_fill(removed_E, float("-inf"))
        return logits_NE, *route(logits_NE, top_k)

    handle = router.register_forward_hook(restrict)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of one layer, gate and up interleaved in the last dimension.

    Attributes:
        gate_up_EDF: first projection, F = 2 I.
        gate_up_bias_EF: its bias.
        down_EID: second projection.
        down_bias_ED: its bias.
        alpha: slope inside the gate's sigmoid.
        limit: clamp of gate (above) and up (both sides).
    """

    gate_up_EDF: Tensor
    gate_up_bias_EF: Tensor
    down_EID: Tensor
    down_bias_ED: Tensor
    alpha: float
    limit: float

    def output(self, expert: int, inputs_ND: Tensor) -> Tensor:
        """Return the output (N, D) of one expert, before gating."""
        gate_up_NF = torch.addmm(self.gate_up_bias_EF[expert], inputs_ND, self.gate_up_EDF[expert])
        gated_NI = clamped_swiglu(gate_up_NF, self.alpha, self.limit)
        return torch.addmm(self.down_bias_ED[expert], gated_NI, self.down_EID[expert])


def expert_weights(moe: Any) -> ExpertWeights:
    """Return the parameters of the experts of an MoE layer (see `moe_of`), not copied."""
    experts = moe.experts
    return ExpertWeights(
        gate_up_EDF=experts.gate_up_proj,
        gate_up_bias_EF=experts.gate_up_proj_bias,
        down_EID=experts.down_proj,
        down_bias_ED=experts.down_proj_bias,
        alpha=experts.alpha,
        limit=experts.limit,
    )


def clamped_swiglu(gate_up_NF: Tensor, alpha: float, limit: float) -> Tensor:
    """Return (up + 1) x gate x sigmoid(alpha gate), shape (N, I), of interleaved gate and up."""
    gate_NI = gate_up_NF[:, ::2].clamp(max=limit)
    up_NI = gate_up_NF[:, 1::2].clamp(-limit, limit)
    return (gate_NI * alpha).sigmoid_().mul_(gate_NI).mul_(up_NI.add_(1))
