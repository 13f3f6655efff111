"""Surgery on one layer: pure functions from a parent layer's tensors to a smaller layer's tensors.

Experts are rows: of the router's weight and bias, and of every expert tensor in the plain layout (`gate_up_proj`,
`down_proj`, `*_bias`) as in the MXFP4 layout (`*_blocks`, `*_scales`, `*_bias`). Selecting rows moves bytes and
rounds nothing, so MXFP4 stays bit-exact. A window changes no tensor: it lives in the configuration alone.

Source: arXiv 2602.11937: a pruned layer keeps the chosen experts and their router rows, nothing is
renormalized. Names are relative to the layer (`mlp.router.weight`), see `lit_puzzle.model.layout`. E counts experts.
Memory: the new layer's expert rows, except where the kept experts are one run of neighbors: then a view, no bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_puzzle.model.layout import EXPERT_ROWS


def count_experts(tensors: Mapping[str, Tensor]) -> int:
    """Number of experts of a layer, on which all of its expert tensors must agree.

    Raises:
        ValueError: When there is no router, or tensors disagree.
    """
    if "mlp.router.weight" not in tensors:
        raise ValueError(f"a layer needs mlp.router.weight; given: {sorted(tensors)}")
    experts = int(tensors["mlp.router.weight"].shape[0])
    for name in sorted(EXPERT_ROWS & tensors.keys()):
        if tensors[name].shape[0] != experts:
            raise ValueError(f"{name} has {tensors[name].shape[0]} experts, but mlp.router.weight has {experts}")
    return experts


def select_rows(tensor: Tensor, kept: Sequence[int]) -> Tensor:
    """Rows `kept` of the first dimension in that order; a view when they are neighbors in ascending order."""
    first, count = kept[0], len(kept)
    if list(kept) == list(range(first, first + count)):
        return tensor[first : first + count]
    return tensor.index_select(0, torch.tensor(kept, device=tensor.device))


def prune_layer(tensors: Mapping[str, Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
    """Keep only the experts `kept` of a layer.

    Args:
        tensors: The parent layer's tensors by their name inside the layer. They are not changed.
        kept: Indices of the parent's experts in their new order; no duplicates.

    Returns:
        The smaller layer: same names; expert tensors with len(kept) rows, all others the same objects.

    Raises:
        ValueError: When `kept` is empty, repeats an expert or names one that the layer has not.
    """
    experts = count_experts(tensors)
    if not kept:
        raise ValueError("kept is empty; a layer keeps at least one expert")
    if len(set(kept)) != len(kept):
        raise ValueError(f"kept repeats an expert: {list(kept)}")
    unknown = [index for index in kept if not 0 <= index < experts]
    if unknown:
        raise ValueError(f"kept names experts {unknown}; the layer has {experts} (indices 0..{experts - 1})")
    return {name: select_rows(tensor, kept) if name in EXPERT_ROWS else tensor for name, tensor in tensors.items()}
