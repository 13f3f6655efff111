"""Experts of long sequences, some tokens at a time: a layer's activations grow no longer with all tokens.

Each token passes the router and the experts by itself, so that a layer may take them in chunks. Of a layer of gpt-oss's
shape the MoE keeps 0.16 MB for each token between forward and backward, attention and norms 0.09 MB. In chunks with
activation checkpointing it keeps its input, 2 bytes * channels, and has the rest for one chunk only; the price is one
more forward pass of the MoE.

Reads and writes nothing. Source: activation checkpointing, arXiv 1604.06174.
Shapes: B rows, T tokens, D hidden channels, K experts per token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lit_puzzle.model.modules import model_family, moe_of

Moe = Callable[[Tensor], tuple[Tensor, Tensor]]  # (B, T, D) -> output (B, T, D), gates (B * T, K)


def chunk_experts(model: PreTrainedModel, tokens: int) -> None:
    """Let every decoder layer take at most so many tokens at a time through router and experts.

    Hooks on the router and on the experts then see one chunk after the other.

    Args:
        model: a causal language model of a known family.
        tokens: of a chunk; batches of at most so many are not divided.
    """
    family = model_family(model)
    for decoder in model.model.layers:
        chunk_moe(moe_of(decoder, family), tokens)


def chunk_moe(moe: Any, tokens: int) -> None:
    """Let one MoE layer take at most so many tokens at a time."""
    moe.forward = partial(_in_chunks, moe.forward, tokens)


def _in_chunks(forward: Moe, tokens: int, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
    if hidden_BTD.shape[:2].numel() <= tokens:
        return forward(hidden_BTD)
    run = partial(checkpoint, forward, use_reentrant=False) if torch.is_grad_enabled() else forward
    parts = [run(part) for part in hidden_BTD.flatten(0, 1)[None].split(tokens, dim=1)]
    outputs, gates = zip(*parts, strict=True)
    return torch.cat(outputs, dim=1).view(hidden_BTD.shape), torch.cat(gates)
