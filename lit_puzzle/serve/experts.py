"""Pack the experts of an exported folder in MXFP4, or unpack them.

Packing: an expert whose values equal those of an MXFP4 parent's expert gets the parent's bytes; any other expert is
rounded by the rule of `lit_puzzle.model.mxfp4` (one power of two for 32 values, no clipping, nearest code, ties to
even). Unpacking is exact: bfloat16 represents every MXFP4 value.

relative error of the rounded experts = sqrt(sum (x - q)^2 / sum x^2), over all their values x, rounded to q.

Reads tensors of the checkpoint and the parent. Traffic: every value is read once, with the parent's value for it.
Memory, for the larger matrix of a layer of E experts with N values each: packing E N 17/32 + about 22 N bytes;
unpacking 2 E N + max(2 E N, 20 N) (bfloat16: in rows, then transposed). At 20B (E 32, N 16.6 million): 0.6 GiB and
2.0 GiB.
Source: arXiv 2602.11937 (experts stay in the parent's MXFP4); OCP Microscaling Formats (MX) v1.0.
Shape legend: E experts, C values of a row (input), R rows (output), G = C / 32 blocks of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import LayerNames
from lit_puzzle.model.layout import MXFP4_BLOCK, layer_prefix
from lit_puzzle.model.mxfp4 import dequantize, expert_weight, quantize
from lit_puzzle.model.safetensors_file import DTYPE_CODES
from lit_puzzle.serve.weights import Weight, Weights
from lit_puzzle.spec import Plan


@dataclass
class Rounding:
    """Counts and errors of packing, updated while tensors are written."""

    copied_experts: int = 0
    rounded_experts: int = 0
    squared_error: float = 0.0
    squared_values: float = 0.0

    def relative_error(self) -> float:
        """Return the relative error of the rounded experts; 0 if none was rounded."""
        return math.sqrt(self.squared_error / self.squared_values) if self.squared_values else 0.0

    def round(self, values_RC: Tensor) -> tuple[Tensor, Tensor]:
        """Round the rows of one expert and add up the error; return blocks and scales."""
        blocks_RG16, scales_RG = quantize(values_RC)
        exact = values_RC.float()
        self.rounded_experts += 1
        self.squared_values += float(exact.double().square().sum())
        rounded = dequantize(blocks_RG16, scales_RG, torch.float32)
        rounded -= exact  # which may be the stored tensor itself
        self.squared_error += float(rounded.double().square().sum())
        return blocks_RG16, scales_RG


def unpacked(weights: Weights, dtype: torch.dtype, names: LayerNames) -> Weights:
    """Return the weights with all packed experts in floating point, in the plain layout."""
    result: Weights = {}
    for name, weight in weights.items():
        if name.endswith(tuple(f"{matrix}_blocks" for matrix in names.expert_matrices)):
            plain = name.removesuffix("_blocks")
            experts, rows, groups, _ = weight.shape
            result[plain] = Weight(
                DTYPE_CODES[dtype],
                (experts, groups * MXFP4_BLOCK, rows),
                lambda blocks=weight, scales=weights[f"{plain}_scales"]: expert_weight(  # type: ignore[misc]
                    blocks.read(), scales.read(), dtype
                ),
            )
        elif not name.endswith(tuple(f"{matrix}_scales" for matrix in names.expert_matrices)):
            result[name] = weight
    return result


def packed(weights: Weights, parent: tuple[Checkpoint, Plan] | None, rounding: Rounding, names: LayerNames) -> Weights:
    """Return the weights with all experts in MXFP4; experts that are packed stay unchanged.

    Args:
        weights: weights of the child.
        parent: an MXFP4 parent and the plan with the experts that the child kept; None: all experts are rounded.
        rounding: counts the experts while they are written.
        names: names of the family.

    Raises:
        ValueError: rows that do not divide into blocks of 32.
    """
    matrices = tuple(f"{names.experts}.{matrix}" for matrix in names.expert_matrices)
    result: Weights = {}
    for name, weight in weights.items():
        if not name.endswith(matrices):
            result[name] = weight
            continue
        experts, values, rows = weight.shape
        if values % MXFP4_BLOCK:
            raise ValueError(
                f"{name} has rows of {values} values; MXFP4 has one scale for {MXFP4_BLOCK}, so that must divide "
                "them. Export with storage.experts: plain"
            )
        expert = _Packing(name, weight, parent, rounding)
        groups = (experts, rows, values // MXFP4_BLOCK)
        result[f"{name}_blocks"] = Weight("U8", (*groups, MXFP4_BLOCK // 2), expert.blocks)
        result[f"{name}_scales"] = Weight("U8", groups, expert.scales)
    return result


class _Packing:
    """Packing of one expert matrix of a layer: first the blocks, then the scales found with them."""

    def __init__(self, name: str, weight: Weight, parent: tuple[Checkpoint, Plan] | None, rounding: Rounding) -> None:
        self._name, self._weight, self._rounding = name, weight, rounding
        self._parent = None if parent is None else parent[0]
        layer = int(name.removeprefix("model.layers.").split(".")[0])
        self._kept = () if parent is None else parent[1].blocks[layer].experts
        self._scales_ERG: Tensor | None = None

    def blocks(self) -> Tensor:
        """Pack all experts; return their blocks."""
        experts, values, rows = self._weight.shape
        groups = (experts, rows, values // MXFP4_BLOCK)
        blocks_ERG16 = torch.empty(*groups, MXFP4_BLOCK // 2, dtype=torch.uint8)
        self._scales_ERG = torch.empty(groups, dtype=torch.uint8)
        for row, values_CR in enumerate(self._weight.read()):
            blocks_ERG16[row], self._scales_ERG[row] = self._pack(row, values_CR)
        return blocks_ERG16

    def scales(self) -> Tensor:
        """Return the scales of the blocks, once."""
        scales_ERG, self._scales_ERG = self._scales_ERG, None
        if scales_ERG is None:
            raise ValueError(f"the scales of {self._name} were read before its blocks")
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
    """Check that an MXFP4 parent is the parent of the plan, and packed in every layer.

    Raises:
        ValueError: it is another parent, or has experts that are not MXFP4.
    """
    if plan.parent_fingerprint != parent.fingerprint():
        raise ValueError(
            f"storage.mxfp4_parent {parent.folder} is {parent.fingerprint()}, but the child's plan.json is of the "
            f"parent {plan.parent_fingerprint}: expert indices would mean other experts"
        )
    plain = sorted(set(range(parent.num_layers)) - parent.mxfp4_layers)
    if plain:
        raise ValueError(
            f"storage.mxfp4_parent {parent.folder} has no MXFP4 experts in layers {plain} "
            f"({layer_prefix(plain[0])}...); without storage.mxfp4_parent, experts are rounded"
        )
