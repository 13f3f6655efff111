"""Convert a child to the stock architecture of its family, for runtimes without support for children and for checks.

`stock` writes the child unchanged if the stock architecture can represent it: the same number of experts in every
layer, and one window, in the layers where the family has windows and in no others (engines assume these layers and do
not read `layer_types`).

`masked` fills every layer up to the same number of experts. The child's experts are in the places that they had in the
parent, which plan.json lists. The others have weights 0 and the router bias `MASK`, so that the router never chooses
them, or, in a layer with fewer experts than the router chooses, gives them the weight exp(MASK) = 0. The logits are the
child's in every engine that reads `layer_types`. A masked folder saves no memory; it is for checking engines.

Memory: `masked` makes one expert tensor of a layer at a time. Source: routers that apply softmax to their top k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_puzzle.model.family import Family
from lit_puzzle.model.layout import layer_prefix
from lit_puzzle.model.safetensors_file import DTYPES
from lit_puzzle.serve.configs import Blocks
from lit_puzzle.serve.weights import Weight, Weights
from lit_puzzle.spec import Plan

MASK = -(2.0**14)  # a router bias that bfloat16 and float16 represent exactly, far below every logit


def check_stock(blocks: Blocks, family: Family) -> None:
    """Check that the stock architecture can represent a child.

    Raises:
        ValueError: numbers of experts differ, or the windows are not those of the stock architecture.
    """
    counts = sorted({count for count, _ in blocks})
    if len(counts) > 1:
        raise ValueError(
            f"storage.format: stock needs the same number of experts in every layer; this child has {counts}. Search "
            "with uniform_experts: true, or export with storage.format: puzzle (or masked, to check an engine)"
        )
    _check_one_window(blocks, "stock")
    kinds = family.config.layer_types
    for layer, (_, window) in enumerate(blocks):
        kind = kinds[layer % len(kinds)]
        if (window is None) != (kind == "full_attention"):
            found = "full attention" if window is None else f"a window of {window}"
            raise ValueError(
                f"storage.format: stock needs the windows that engines assume for {family.model_type}, {kind} in layer "
                f"{layer}; layer {layer} has {found}. Search with windows: unchanged, or export with storage.format: "
                "puzzle"
            )


def check_masked(blocks: Blocks) -> None:
    """Check that a child has no more than one size of window.

    Raises:
        ValueError: two layers have different windows.
    """
    _check_one_window(blocks, "masked")


def _check_one_window(blocks: Blocks, form: str) -> None:
    windows = sorted({window for _, window in blocks if window is not None})
    if len(windows) > 1:
        raise ValueError(
            f"storage.format: {form} has one window for all windowed layers; this child has {windows}. Export with "
            "storage.format: puzzle"
        )


def positions(blocks: Blocks, plan: Plan | None) -> tuple[list[tuple[int, ...]], int]:
    """Return the indices of each layer's experts in the full-size layer, and its number of experts.

    Without a plan the experts come first, and the full size is that of the layer with most experts.
    """
    if plan is None:
        return [tuple(range(count)) for count, _ in blocks], max(count for count, _ in blocks)
    return [block.experts for block in plan.blocks], plan.num_parent_experts


def masked(weights: Weights, kept: Sequence[tuple[int, ...]], experts: int, family: Family) -> Weights:
    """Fill every layer up with experts that are never chosen.

    Args:
        weights: weights of the child.
        kept: indices of each layer's experts in the full-size layer.
        experts: number of experts in a full-size layer.
        family: family of the child.
    """
    result = dict(weights)
    bias = family.layer.router_tensors[1]
    for layer, places in enumerate(kept):
        for name in family.layer.expert_rows:
            full_name = layer_prefix(layer) + name
            if full_name in weights and places != tuple(range(experts)):
                result[full_name] = _filled_up(weights[full_name], places, experts, MASK if name == bias else 0.0)
    return result


def _filled_up(weight: Weight, places: tuple[int, ...], experts: int, fill: float) -> Weight:
    shape = (experts, *weight.shape[1:])

    def read() -> Tensor:
        full = torch.full(shape, fill, dtype=DTYPES[weight.dtype])
        full[list(places)] = weight.read()
        return full

    return Weight(weight.dtype, shape, read)
