"""Prunes the experts of a layer: the parent's tensors become those of a smaller layer.

Experts are rows: of the router's weight and bias, and of every expert tensor in the plain layout as in the MXFP4
layout (`LayerNames.expert_rows` of `lit_puzzle.model.family`). Selecting rows moves bytes and rounds nothing, so MXFP4
stays bit-exact. A window changes no tensor, only the configuration.

Source: arXiv 2602.11937 (a pruned layer keeps the chosen experts and their router rows; nothing is renormalized).
Memory: the rows of the new layer; none where the kept experts are consecutive, then the result is a view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_puzzle.model.family import LayerNames


def prune_layer(tensors: Mapping[str, Tensor], kept: Sequence[int], names: LayerNames) -> dict[str, Tensor]:
    """Keep only some experts of a layer.

    Args:
        tensors: some or all tensors of the parent's layer by their name inside the layer; they are not changed.
        kept: indices of the parent's experts in their new order.
        names: of the model's family.

    Returns:
        The same names; tensors of experts and router have len(kept) rows, all others are the same objects.

    Raises:
        ValueError: `kept` is empty, repeats an expert, or contains one that the layer does not have.
    """
    if not kept or len(set(kept)) != len(kept):
        raise ValueError(f"a layer keeps at least one expert and each only once, got {list(kept)}")
    return {
        name: _select_rows(name, tensor, kept) if name in names.expert_rows else tensor
        for name, tensor in tensors.items()
    }


def _select_rows(name: str, tensor: Tensor, kept: Sequence[int]) -> Tensor:
    """Return rows of the first dimension in this order; a view if they are consecutive."""
    unknown = [index for index in kept if not 0 <= index < len(tensor)]
    if unknown:
        raise ValueError(f"{name} has {len(tensor)} experts (indices 0..{len(tensor) - 1}), kept contains {unknown}")
    first, count = kept[0], len(kept)
    if list(kept) == list(range(first, first + count)):
        return tensor[first : first + count]
    return tensor.index_select(0, torch.tensor(kept, device=tensor.device))
