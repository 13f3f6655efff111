"""MXFP4, the 4-bit format of gpt-oss experts: dequantizing, and quantizing by rounding to nearest.

A row of values is cut into blocks of 32. A value is one E2M1 code of 4 bits (sign, then 0, 0.5, 1, 1.5, 2, 3, 4 or
6); two codes make a byte, the earlier value in the low half. A block shares one E8M0 scale byte s, worth 2^(s - 127):
value = code x 2^(s - 127).

Dequantizing agrees with transformers' `convert_moe_packed_tensors` bit for bit, for all bytes and scales.

Quantizing: the block's scale is the smallest power of two that clips nothing, s = 127 + ceil(log2(max|x| / 6)), and
every value is rounded to the nearest code, ties to the even one. So |x - q(x)| <= max(|x| / 5, 2^(s - 127) / 4), and
dequantized values are quantized back exactly (including the sign of zero), though possibly with another scale.

Source: OCP Microscaling Formats (MX) v1.0, sections 5.3 and 6; the scale rule is the round-up variant, which never
saturates.
Shape legend: G blocks of a row, 16 bytes of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from lit_puzzle.model.layout import MXFP4_BLOCK

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCALE_BIAS = 127
_MIDPOINTS = tuple((low + high) / 2 for low, high in itertools.pairwise(MAGNITUDES))


def _byte_values(device: torch.device) -> Tensor:
    """Return the two values of every byte, low half first, as one int32 that holds both in bfloat16: [256]."""
    codes = torch.tensor(MAGNITUDES + tuple(-value for value in MAGNITUDES), dtype=torch.bfloat16, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack((codes[byte & 15], codes[byte >> 4]), dim=1).view(torch.int32).flatten()


def _half_scales(device: torch.device) -> Tensor:
    """Return half of every scale byte's worth, 2^(s - 128), which bfloat16 represents for all of them: [256]."""
    exponents = torch.arange(256, device=device) - (SCALE_BIAS + 1)
    return torch.ldexp(torch.ones(256, device=device), exponents).bfloat16()


def _check(blocks: Tensor, scales: Tensor) -> None:
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"MXFP4 blocks and scales are uint8; got {blocks.dtype} and {scales.dtype}")
    if blocks.shape[-1] != MXFP4_BLOCK // 2 or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            f"MXFP4 blocks are [..., G, {MXFP4_BLOCK // 2}] and scales [..., G]; "
            f"got {tuple(blocks.shape)} and {tuple(scales.shape)}"
        )


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the floating-point values of MXFP4 rows.

    Args:
        blocks: uint8 [..., G, 16].
        scales: uint8 [..., G]. The byte 255, not a number in the standard, is read as 2^128 as transformers does.
        dtype: of the result (bfloat16 represents the values exactly up to its largest number).

    Returns:
        [..., G * 32] in `dtype`. Besides the result, memory is about 10 bytes per block byte of one leading index.

    Raises:
        ValueError: dtypes or shapes are not those of MXFP4.
    """
    _check(blocks, scales)
    rows = blocks.reshape(-1, *blocks.shape[-3:]) if blocks.dim() > 2 else blocks[None]
    row_scales = scales.reshape(-1, *scales.shape[-2:]) if blocks.dim() > 2 else scales[None]
    result = torch.empty(*rows.shape[:-1], MXFP4_BLOCK, dtype=dtype, device=blocks.device)
    for index, values in enumerate(_by_leading_index(rows, row_scales)):
        result[index] = values
    return result.view(*blocks.shape[:-2], -1)


def _by_leading_index(rows: Tensor, scales: Tensor) -> Iterator[Tensor]:
    """Yield the values [..., G, 32] of each leading index in bfloat16, exact: a code has two significant bits."""
    pairs, half_scales = _byte_values(rows.device), _half_scales(rows.device)
    for blocks, block_scales in zip(rows, scales, strict=True):  # one at a time: the look-up widens every byte
        values = pairs.index_select(0, blocks.flatten().int()).view(torch.bfloat16)
        values = values.view(*block_scales.shape, MXFP4_BLOCK)
        yield values.mul_(half_scales[block_scales.int()].unsqueeze(-1)).mul_(2)


def expert_weight(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return MXFP4 experts in the plain layout of gpt-oss: [E, rows, G, 16] -> [E, G * 32, rows], contiguous.

    Besides the result, memory is about 10 bytes per block byte of one expert.
    """
    _check(blocks, scales)
    experts, rows, groups, _ = blocks.shape
    result = torch.empty(experts, groups * MXFP4_BLOCK, rows, dtype=dtype, device=blocks.device)
    for expert, values in enumerate(_by_leading_index(blocks, scales)):
        result[expert] = values.view(rows, -1).T
    return result


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows of values to MXFP4 by the rule at the top of this file.

    Args:
        values: floating point [..., G * 32].

    Returns:
        Blocks uint8 [..., G, 16] and scales uint8 [..., G].

    Raises:
        ValueError: a row does not divide into blocks of 32, or a value is not finite.
    """
    if values.shape[-1] % MXFP4_BLOCK or not values.is_floating_point():
        raise ValueError(
            f"MXFP4 needs float rows of a multiple of {MXFP4_BLOCK}; got {values.dtype} {tuple(values.shape)}"
        )
    if not torch.isfinite(values).all():
        raise ValueError("MXFP4 cannot represent infinite values or NaN; the tensor has some")
    exact = values.to(torch.promote_types(values.dtype, torch.float32)).unflatten(-1, (-1, MXFP4_BLOCK))
    exponents = _scale_exponents(exact.abs().amax(-1))
    scaled = torch.ldexp(exact, -exponents.unsqueeze(-1))
    codes = torch.signbit(exact).to(torch.uint8) << 3
    for code, midpoint in enumerate(
        _MIDPOINTS
    ):  # above the midpoint, or on it when the upper neighbor is the even code
        size = scaled.abs()
        codes += (size >= midpoint if code % 2 else size > midpoint).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponents + SCALE_BIAS).to(torch.uint8)


def quantize_experts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize plain experts: [E, G * 32, rows] -> MXFP4 blocks [E, rows, G, 16] and scales [E, rows, G].

    The inverse of `expert_weight` on values that came from MXFP4. Memory: the result, and about 20 bytes per value of
    one expert.
    """
    blocks, scales = zip(*(quantize(expert.T) for expert in weight), strict=True)
    return torch.stack(blocks), torch.stack(scales)


def _scale_exponents(largest: Tensor) -> Tensor:
    """Return ceil(log2(largest / 6)) as int32, at least -127 (the exponent of a block of zeros)."""
    mantissa, exponent = torch.frexp(largest / MAGNITUDES[-1])
    ceiling = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(largest > 0, ceiling, -SCALE_BIAS).clamp(min=-SCALE_BIAS).to(torch.int32)
