"""A child as plain gpt-oss: for runtimes that know nothing else, and for checking any engine.

`stock` writes the child as it is, where plain gpt-oss can say it: as many experts in every layer, one window, in the
even layers and nowhere else (engines have that rule built in and do not read `layer_types`).

`masked` fills every layer up to one number of experts. The child's experts stand where its plan.json says they stood
in the parent; the others have weights 0 and the router bias `MASK`, so that routing never chooses them, or, in a layer
with fewer experts than a token takes, gives them the weight exp(MASK) = 0. The logits are the child's, in any engine
that reads `layer_types`. It saves nothing: it is a check.

Memory: `masked` makes one expert tensor of a layer at a time. Source: a router that softmaxes over its top k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_puzzle.model.layout import EXPERT_ROWS, layer_prefix
from lit_puzzle.model.safetensors_file import DTYPES
from lit_puzzle.serve.configs import Blocks
from lit_puzzle.serve.weights import Weight, Weights
from lit_puzzle.spec import Plan

MASK = -(2.0**14)  # a router bias that bfloat16 and float16 hold exactly; logits are smaller by orders of magnitude


def check_stock(blocks: Blocks) -> None:
    """Checks that plain gpt-oss can say what a child is.

    Raises:
        ValueError: Expert counts differ, or the windows are not those of plain gpt-oss.
    """
    counts = sorted({count for count, _ in blocks})
    if len(counts) > 1:
        raise ValueError(
            f"format: stock needs the same number of experts in every layer; this child has {counts}. Search with "
            "uniform_experts: true, or export with format: puzzle (or masked, to check an engine)"
        )
    _check_one_window(blocks, "stock")
    for layer, (_, window) in enumerate(blocks):
        if (window is None) != bool(layer % 2):
            told = "full attention" if window is None else f"a window of {window}"
            raise ValueError(
                f"format: stock needs a window in the even layers and in no other, as engines have built in; layer "
                f"{layer} has {told}. Search with windows: unchanged, or export with format: puzzle"
            )


def check_masked(blocks: Blocks) -> None:
    """Checks that one window is enough.

    Raises:
        ValueError: Two layers have different windows.
    """
    _check_one_window(blocks, "masked")


def _check_one_window(blocks: Blocks, form: str) -> None:
    windows = sorted({window for _, window in blocks if window is not None})
    if len(windows) > 1:
        raise ValueError(
            f"format: {form} has one window for all windowed layers; this child has {windows}. Export with format: "
            "puzzle"
        )


def positions(blocks: Blocks, plan: Plan | None) -> tuple[list[tuple[int, ...]], int]:
    """Where each layer's experts stand in the full-size layer, and how many experts that has.

    Without a plan they stand first, and the layer with most experts is full.
    """
    if plan is None:
        return [tuple(range(count)) for count, _ in blocks], max(count for count, _ in blocks)
    return [block.experts for block in plan.blocks], plan.num_parent_experts


def masked(weights: Weights, rows: Sequence[tuple[int, ...]], experts: int) -> Weights:
    """The weights with every layer filled up to `experts` experts, of which the added ones are never chosen."""
    result = dict(weights)
    for layer, kept in enumerate(rows):
        for name in EXPERT_ROWS:
            full_name = layer_prefix(layer) + name
            if full_name in weights and kept != tuple(range(experts)):
                fill = MASK if name == "mlp.router.bias" else 0.0
                result[full_name] = _filled_up(weights[full_name], kept, experts, fill)
    return result


def _filled_up(weight: Weight, kept: tuple[int, ...], experts: int, fill: float) -> Weight:
    shape = (experts, *weight.shape[1:])

    def read() -> Tensor:
        full = torch.full(shape, fill, dtype=DTYPES[weight.dtype])
        full[list(kept)] = weight.read()
        return full

    return Weight(weight.dtype, shape, read)
