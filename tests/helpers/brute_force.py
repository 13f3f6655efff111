"""The definition of leave-one-out importance, literally: one more pass of the stock layer per expert."""

import torch
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from lit_puzzle.importance.expert_scores import ImportanceMethod, LeaveOneOut
from lit_puzzle.importance.scored_layers import ScoredMoE
from lit_puzzle.model.family import GPT_OSS


def make_layer(num_experts: int, top_k: int, hidden: int = 16, intermediate: int = 8, seed: int = 0) -> GptOssMLP:
    config = GptOssConfig(
        num_hidden_layers=1,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        experts_implementation="eager",
    )
    generator = torch.Generator().manual_seed(seed)
    layer = GptOssMLP(config).double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def make_inputs(hidden: int = 16, tokens: int = 50, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens // 2, hidden, generator=generator, dtype=torch.float64)


def brute_force(layer: GptOssMLP, hidden: Tensor, counted: Tensor) -> Tensor:
    """The definition: for each expert another full run of the stock layer, its logit at -inf for every token."""
    with torch.no_grad():
        output = layer(hidden)[0]
        scores = []
        for expert in range(layer.router.num_experts):
            bias = layer.router.bias.clone()
            layer.router.bias[expert] = float("-inf")
            errors = (layer(hidden)[0] - output).square().mean(-1)
            layer.router.bias.copy_(bias)
            scores.append(errors[counted].mean())
    return torch.stack(scores)


def score(
    layer: GptOssMLP, hidden: Tensor, counted: Tensor, method: ImportanceMethod | None = None, chunk: int = 7
) -> tuple[Tensor, Tensor]:
    """Scores and output of our layer."""
    scored = ScoredMoE(layer, GPT_OSS, 0, method or LeaveOneOut(), chunk)
    scored.counted_BT = counted
    with torch.no_grad():
        output = scored(hidden)[0]
    return scored.sums_2E[0] / scored.sums_2E[1].clamp(min=1), output
