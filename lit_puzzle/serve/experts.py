"""How the experts of an exported folder are stored: as they are, in floating point, or packed in MXFP4.

Packing: an expert that still has exactly the values of an MXFP4 parent's expert gets that parent's bytes; any other
expert is rounded by the rule of `lit_puzzle.model.mxfp4` (a power of two for 32 values, nothing clipped, nearest code,
ties to even). Unpacking is exact: bfloat16 holds every MXFP4 value.

relative error of the rounded experts = sqrt(sum (x - q)^2 / sum x^2), over all their values x, rounded to q.

Reads: the checkpoint's and the parent's tensors. Traffic: every value is read once, and the parent's beside it.
Memory, for a layer's larger matrix of E experts with N values each: packing E N 17/32 + about 22 N bytes; unpacking
2 E N + max(2 E N, 20 N) (bfloat16: in rows, then transposed). At 20B (E 32, N 16.6 million): 0.6 GiB and 2.0 GiB.
Source: design of arXiv 2602.11937 (experts stay in the parent's MXFP4); OCP Microscaling Formats (MX) v1.0.
Shape legend: E experts, C values of a row (input), R rows (output), G = C / 32 blocks of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import EXPERT_MATRICES, MXFP4_BLOCK, layer_prefix
from lit_puzzle.model.mxfp4 import dequantize, expert_weight, quantize
from lit_puzzle.model.safetensors_file import DTYPE_CODES
from lit_puzzle.serve.weights import Weight, Weights
from lit_puzzle.spec import Plan


@dataclass
class Rounding:
    """What packing did, counted as tensors are written."""

    copied_experts: int = 0
    rounded_experts: int = 0
    squared_error: float = 0.0
    squared_values: float = 0.0

    def relative_error(self) -> float:
        """Of the rounded experts; 0 where nothing was rounded."""
        return math.sqrt(self.squared_error / self.squared_values) if self.squared_values else 0.0

    def round(self, values_RC: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds one expert's rows and counts the error."""
        blocks_RG16, scales_RG = quantize(values_RC)
        exact = values_RC.float()
        self.rounded_experts += 1
        self.squared_values += float(exact.double().square().sum())
        exact -= dequantize(blocks_RG16, scales_RG, torch.float32)
        self.squared_error += float(exact.double().square().sum())
        return blocks_RG16, scales_RG


def unpacked(weights: Weights, dtype: torch.dtype) -> Weights:
    """All packed experts in floating point, in the plain layout."""
    result: Weights = {}
    for name, weight in weights.items():
        if name.endswith(tuple(f"{matrix}_blocks" for matrix in EXPERT_MATRICES)):
            plain = name.removesuffix("_blocks")
            experts, rows, groups, _ = weight.shape
            result[plain] = Weight(
                DTYPE_CODES[dtype],
                (experts, groups * MXFP4_BLOCK, rows),
                lambda blocks=weight, scales=weights[f"{plain}_scales"]: expert_weight(  # type: ignore[misc]
                    blocks.read(), scales.read(), dtype
                ),
            )
        elif not name.endswith(tuple(f"{matrix}_scales" for matrix in EXPERT_MATRICES)):
            result[name] = weight
    return result


def packed(weights: Weights, parent: tuple[Checkpoint, Plan] | None, rounding: Rounding) -> Weights:
    """All experts in MXFP4; what is packed already stays as it is.

    Args:
        weights: The child's.
        parent: An MXFP4 parent, and the plan that says which of its experts the child kept; None rounds everything.
        rounding: Is told what becomes of each expert.

    Raises:
        ValueError: Rows that do not divide into blocks of 32, or a parent whose experts are not packed.
    """
    result: Weights = {}
    for name, weight in weights.items():
        if not name.endswith(tuple(f"mlp.experts.{matrix}" for matrix in EXPERT_MATRICES)):
            result[name] = weight
            continue
        experts, values, rows = weight.shape
        if values % MXFP4_BLOCK:
            raise ValueError(
                f"{name} has rows of {values} values; MXFP4 shares a scale among {MXFP4_BLOCK}, so they must divide "
                "by it. Export with experts: plain"
            )
        expert = _Packing(name, weight, parent, rounding)
        groups = (experts, rows, values // MXFP4_BLOCK)
        result[f"{name}_blocks"] = Weight("U8", (*groups, MXFP4_BLOCK // 2), expert.blocks)
        result[f"{name}_scales"] = Weight("U8", groups, expert.scales)
    return result


class _Packing:
    """One expert matrix of a layer on its way to MXFP4: blocks first, then the scales that came with them."""

    def __init__(self, name: str, weight: Weight, parent: tuple[Checkpoint, Plan] | None, rounding: Rounding) -> None:
        self._name, self._weight, self._rounding = name, weight, rounding
        self._parent = None if parent is None else parent[0]
        layer = int(name.removeprefix("model.layers.").split(".")[0])
        self._kept = () if parent is None else parent[1].blocks[layer].experts
        self._scales_ERG: Tensor | None = None

    def blocks(self) -> Tensor:
        """Packs all experts."""
        experts, values, rows = self._weight.shape
        groups = (experts, rows, values // MXFP4_BLOCK)
        blocks_ERG16 = torch.empty(*groups, MXFP4_BLOCK // 2, dtype=torch.uint8)
        self._scales_ERG = torch.empty(groups, dtype=torch.uint8)
        for row, values_CR in enumerate(self._weight.read()):
            blocks_ERG16[row], self._scales_ERG[row] = self._pack(row, values_CR)
        return blocks_ERG16

    def scales(self) -> Tensor:
        """The scales of the blocks; they are handed out once."""
        scales_ERG, self._scales_ERG = self._scales_ERG, None
        if scales_ERG is None:
            raise ValueError(f"the scales of {self._name} were asked for before its blocks")
        return scales_ERG

    def _pack(self, row: int, values_CR: Tensor) -> tuple[Tensor, Tensor]:
        if self._parent is not None:
            index = self._kept[row]
            blocks_1RG16, scales_1RG = (
                self._parent.read(f"{self._name}_{part}")[index : index + 1] for part in ("blocks", "scales")
            )
            if torch.equal(expert_weight(blocks_1RG16, scales_1RG, values_CR.dtype)[0], values_CR):
                self._rounding.copied_experts += 1
                return blocks_1RG16[0], scales_1RG[0]
        return self._rounding.round(values_CR.T)


def check_packed_parent(parent: Checkpoint, plan: Plan) -> None:
    """Check that an MXFP4 parent is the one of the plan, and packed in every layer.

    Raises:
        ValueError: It is another parent, or has experts that are not MXFP4.
    """
    if plan.parent_fingerprint != parent.fingerprint():
        raise ValueError(
            f"mxfp4_parent {parent.folder} is {parent.fingerprint()}, but the child's plan.json is of the parent "
            f"{plan.parent_fingerprint}: expert indices would mean other experts"
        )
    plain = sorted(set(range(parent.num_layers)) - parent.mxfp4_layers)
    if plain:
        raise ValueError(
            f"mxfp4_parent {parent.folder} has no MXFP4 experts in layers {plain} ({layer_prefix(plain[0])}...); "
            "leave mxfp4_parent out, and experts are rounded"
        )
