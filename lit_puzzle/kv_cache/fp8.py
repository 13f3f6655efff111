"""Arithmetic of an FP8 KV cache: rounding, scales, and the error under a scale.

    stored = e4m3(clamp(x / scale, -448, 448))      e4m3: to the nearest, ties to even (torch.float8_e4m3fn)
    read   = stored * scale
    scale  = amax / 448, optionally rounded up to a power of two, so that x / scale is exact

Magnitudes are counted by the upper 16 bits of float32, which is one count for each bfloat16 number: exact for a cache
computed in bfloat16; float32 values are truncated to it. Percentiles, overflow and the squared error of any scale
follow from the counts, whatever the amount of data. Counts are whole numbers: their sum does not depend on the order.

Reads and writes nothing. Memory: 8 * 32768 bytes for each set of counts.
Source: arXiv 2602.11937 (amax / 448, power of two); arXiv 2209.05433 (e4m3).
Shapes: B rows, G key/value heads, T tokens, C channels of a head, N tokens of all rows, M magnitudes (32768).
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from lit_puzzle.kv_cache.scales import E4M3_MAX

MAGNITUDES = 1 << 15
_SEARCH_OCTAVES = 12  # of scales below amax / 448; at the lowest one, amax is 4096 times the largest stored value
_STEPS_PER_OCTAVE = 16


def quantize(x_BGTC: Tensor, scale: Tensor) -> Tensor:
    """Return the stored values of a cache, float8_e4m3fn; values beyond its range saturate and never become NaN.

    Args:
        x_BGTC: keys or values.
        scale: one scale for all heads (scalar), or one for each head (G).
    """
    scaled = x_BGTC.float() / _per_head(scale)  # torch's cast saturates on CPUs only
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def dequantize(stored_BGTC: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what attention reads: stored * scale, in `dtype`."""
    return (stored_BGTC.float() * _per_head(scale)).to(dtype)


def _per_head(scale: Tensor) -> Tensor:
    return scale if scale.ndim == 0 else scale[:, None, None]


def amax_scale(amax: Tensor) -> Tensor:
    """Return amax / 448, rounded so that amax does not saturate: 448 * scale >= amax in float32."""
    scale = amax / E4M3_MAX
    return torch.where(scale * E4M3_MAX < amax, scale.nextafter(torch.full_like(scale, torch.inf)), scale)


def power_of_two_up(x: Tensor) -> Tensor:
    """Return the smallest powers of two that are at least x > 0, elementwise."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2 ** exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(x), torch.where(mantissa == 0.5, exponent - 1, exponent))


def magnitudes() -> Tensor:
    """Return the magnitude (M) that each count stands for, float32; infinite or NaN from index 32640 on."""
    return (torch.arange(MAGNITUDES, dtype=torch.int32) << 16).view(torch.float32)


def count_magnitudes(x_NGC: Tensor, per_head: bool) -> Tensor:
    """Count the magnitudes of keys or values; return int64 of shape (G, M), or (1, M) over all heads."""
    bits_NGC = x_NGC.float().abs().view(torch.int32).long() >> 16
    if not per_head:
        return torch.bincount(bits_NGC.flatten(), minlength=MAGNITUDES)[None]
    heads = x_NGC.shape[1]
    offsets_G1 = torch.arange(heads, device=x_NGC.device)[:, None] * MAGNITUDES
    return torch.bincount((bits_NGC + offsets_G1).flatten(), minlength=heads * MAGNITUDES).view(heads, MAGNITUDES)


def percentile(counts_M: Tensor, percent: float) -> Tensor:
    """Return the smallest magnitude that at least `percent` percent of the values do not exceed, float32."""
    needed = math.ceil(Fraction(str(percent)) * int(counts_M.sum()) / 100)
    place = int((counts_M.cumsum(0) < needed).sum())
    return magnitudes()[place]


def overflow(counts_M: Tensor, scale: Tensor) -> int:
    """Return the number of values beyond 448 * scale."""
    return int(counts_M[magnitudes() > E4M3_MAX * scale].sum())


def squared_error(counts_M: Tensor, scale: Tensor) -> float:
    """Return the sum over all counted values x of (x - read(x))^2 under a scale, in float64."""
    kept = counts_M.nonzero().flatten()
    exact_K = magnitudes()[kept]
    read_K = dequantize(quantize(exact_K, scale), scale, torch.float32)
    return float(((exact_K.double() - read_K.double()) ** 2 * counts_M[kept]).sum())


def least_error_scale(counts_M: Tensor, amax: Tensor, power_of_two: bool) -> Tensor:
    """Return the scale of least squared error; among equals the largest, which leaves most headroom.

    Args:
        counts_M: counts of magnitudes.
        amax: the largest magnitude, a float32 scalar.
        power_of_two: whether to try only powers of two: amax / 448 rounded up, and 12 octaves down. Otherwise 16 scales
            in each octave are tried, from one octave above amax / 448, because the error then depends on where the
            steps of e4m3 lie.
    """
    top = amax_scale(amax)
    if power_of_two:
        tried = [power_of_two_up(top) * 0.5**step for step in range(_SEARCH_OCTAVES + 1)]
    else:
        steps = range(-_STEPS_PER_OCTAVE, _STEPS_PER_OCTAVE * _SEARCH_OCTAVES + 1)
        tried = [top * 2.0 ** (-step / _STEPS_PER_OCTAVE) for step in steps]
    errors = [squared_error(counts_M, scale) for scale in tried]
    return tried[errors.index(min(errors))]
