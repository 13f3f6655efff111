"""What FP8 does to a KV cache, as arithmetic on tensors: scales, rounding, and how much a scale loses.

    stored = e4m3(clamp(x / scale, -448, 448))      e4m3: to the nearest, ties to even (torch.float8_e4m3fn)
    read   = stored * scale
    scale  = amax / 448, and rounded up to a power of two where that is asked for: x / scale is then exact

Magnitudes are counted by the upper 16 bits of float32, that is one count for each bfloat16 number: exact for a cache
computed in bfloat16, and float32 values count as truncated. Percentiles, overflow and the squared error of any scale
follow from the counts, however much data there was. Being whole numbers they add up to the same in any order.

Reads and writes nothing. Memory: 8 * 32768 bytes for each set of counts.
Source: arXiv 2602.11937 (amax / 448, power of two); arXiv 2209.05433 (e4m3).
Shapes: B rows, G key/value heads, T tokens, C channels of a head, N tokens of all rows, M magnitudes (32768).
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from lit_puzzle.kv_cache.kv_scales import E4M3_MAX

MAGNITUDES = 1 << 15
_SEARCH_OCTAVES = 12  # how far below amax / 448 the search goes: amax is then 4096 times what saturates
_STEPS_PER_OCTAVE = 16


def quantize(x_BGTC: Tensor, scale: Tensor) -> Tensor:
    """Stored numbers of a cache, float8_e4m3fn; what is too large becomes the largest number, never NaN.

    Args:
        x_BGTC: Keys or values.
        scale: One for all, or one per head (G).
    """
    scaled = x_BGTC.float() / _per_head(scale)  # torch's cast on CPUs saturates by itself; this does not rely on it
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def dequantize(stored_BGTC: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention reads of stored numbers."""
    return (stored_BGTC.float() * _per_head(scale)).to(dtype)


def _per_head(scale: Tensor) -> Tensor:
    return scale if scale.ndim == 0 else scale[:, None, None]


def saturating_at(amax: Tensor) -> Tensor:
    """The scale amax / 448, rounded so that amax does not saturate: 448 times it is not below amax in float32."""
    scale = amax / E4M3_MAX
    return torch.where(scale * E4M3_MAX < amax, scale.nextafter(torch.full_like(scale, torch.inf)), scale)


def power_of_two_up(x: Tensor) -> Tensor:
    """The smallest powers of two that are not below positive numbers."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2 ** exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(x), torch.where(mantissa == 0.5, exponent - 1, exponent))


def magnitudes() -> Tensor:
    """The number (M) of each count, float32; from index 32640 on they are infinite or NaN."""
    return (torch.arange(MAGNITUDES, dtype=torch.int32) << 16).view(torch.float32)


def count_magnitudes(x_NGC: Tensor, per_head: bool) -> Tensor:
    """Counts of the magnitudes of keys or values, int64: (G, M), or (1, M) over all heads."""
    bits_NGC = x_NGC.float().abs().view(torch.int32).long() >> 16
    if not per_head:
        return torch.bincount(bits_NGC.flatten(), minlength=MAGNITUDES)[None]
    heads = x_NGC.shape[1]
    offsets_G1 = torch.arange(heads, device=x_NGC.device)[:, None] * MAGNITUDES
    return torch.bincount((bits_NGC + offsets_G1).flatten(), minlength=heads * MAGNITUDES).view(heads, MAGNITUDES)


def percentile(counts_M: Tensor, percent: float) -> Tensor:
    """The smallest magnitude that at least `percent` of a hundred values do not exceed, float32."""
    needed = math.ceil(Fraction(str(percent)) * int(counts_M.sum()) / 100)
    place = int((counts_M.cumsum(0) < needed).sum())
    return magnitudes()[place]


def overflow(counts_M: Tensor, scale: Tensor) -> int:
    """Values beyond 448 times a scale."""
    return int(counts_M[magnitudes() > E4M3_MAX * scale].sum())


def squared_error(counts_M: Tensor, scale: Tensor) -> float:
    """Sum over all counted values of (value - what is read of it)^2 at a scale, in float64."""
    kept = counts_M.nonzero().flatten()
    exact_K = magnitudes()[kept]
    read_K = dequantize(quantize(exact_K, scale), scale, torch.float32)
    return float(((exact_K.double() - read_K.double()) ** 2 * counts_M[kept]).sum())


def least_error_scale(counts_M: Tensor, amax: Tensor, power_of_two: bool) -> Tensor:
    """The scale of least squared error; of equals the largest, which leaves most headroom.

    Args:
        counts_M: Counts of magnitudes.
        amax: The largest of them, a float32 scalar.
        power_of_two: Whether only powers of two are tried: from amax / 448, rounded up, 12 octaves down. Otherwise 16
            steps an octave, from one octave above amax / 448 on: where e4m3's steps fall matters then.
    """
    top = saturating_at(amax)
    if power_of_two:
        tried = [power_of_two_up(top) * 0.5**step for step in range(_SEARCH_OCTAVES + 1)]
    else:
        steps = range(-_STEPS_PER_OCTAVE, _STEPS_PER_OCTAVE * _SEARCH_OCTAVES + 1)
        tried = [top * 2.0 ** (-step / _STEPS_PER_OCTAVE) for step in steps]
    errors = [squared_error(counts_M, scale) for scale in tried]
    return tried[errors.index(min(errors))]
