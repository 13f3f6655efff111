"""FP8 arithmetic against torch's own cast, cases worked by hand, and brute force over every value."""

import math

import pytest
import torch

from lit_puzzle.kv_cache.fp8 import (
    amax_scale,
    count_magnitudes,
    dequantize,
    least_error_scale,
    magnitudes,
    overflow,
    percentile,
    power_of_two_up,
    quantize,
    squared_error,
)

E4M3 = sorted({(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)} - {480.0} | {m / 512 for m in range(8)})


def some_values(seed: int = 0, shape: tuple[int, ...] = (200, 2, 8)) -> torch.Tensor:
    """Values of a bfloat16 cache with heavy tails, one head larger than the other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    x[:, 0] *= 7
    return x.bfloat16().float()


def nearest(x: float) -> float:
    """The nearest of all e4m3 numbers, written down from the format's definition; ties to an even mantissa."""
    sign, magnitude = math.copysign(1, x), min(abs(x), 448.0)
    best = min(abs(number - magnitude) for number in E4M3)
    near = [place for place, number in enumerate(E4M3) if abs(number - magnitude) == best]
    return sign * E4M3[near[0] if len(near) == 1 or near[0] % 2 == 0 else near[1]]


def test_rounding_is_to_the_nearest_number_of_the_format():
    assert (len(E4M3), E4M3[-1], E4M3[1]) == (127, 448.0, 2.0**-9)
    scale = torch.tensor(0.25)
    x = torch.cat([some_values().flatten() * 16, torch.tensor([0.0, 4.25, 4.75, -116.0, 1e9, -torch.inf])])
    read = dequantize(quantize(x[None, None, None], scale), scale, torch.float32).flatten()
    assert read.tolist() == [nearest(value / 0.25) * 0.25 for value in x.tolist()]
    assert read[-2:].tolist() == [112.0, -112.0]  # saturated


def test_in_range_it_is_torchs_cast_and_heads_have_their_own_scales():
    x_BGTC = some_values(shape=(3, 2, 5, 8)).clamp(-400, 400)
    one = torch.tensor(1.0)
    assert torch.equal(quantize(x_BGTC, one).view(torch.uint8), x_BGTC.to(torch.float8_e4m3fn).view(torch.uint8))
    both = torch.tensor([0.5, 2.0])
    read = dequantize(quantize(x_BGTC, both), both, torch.bfloat16)
    assert read.dtype == torch.bfloat16
    for head, scale in enumerate((0.5, 2.0)):
        expected = (x_BGTC[:, head] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        assert torch.equal(read[:, head].float(), expected)


@pytest.mark.parametrize(
    ("x", "expected"),
    [(1.0, 1.0), (1.0001, 2.0), (0.75, 1.0), (2.0, 2.0), (3.0, 4.0), (0.25, 0.25), (0.2, 0.25), (2**-20, 2**-20)],
)
def test_rounding_up_to_powers_of_two(x, expected):
    assert float(power_of_two_up(torch.tensor(x))) == expected


def test_scales_of_hand_worked_maxima():
    assert float(amax_scale(torch.tensor(448.0))) == 1.0
    assert float(power_of_two_up(amax_scale(torch.tensor(449.0)))) == 2.0
    assert float(power_of_two_up(amax_scale(torch.tensor(10.0)))) == 2**-5  # 10 / 448 = 0.0223
    amax = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 100
    assert (amax_scale(amax) * 448 >= amax).all()
    assert ((amax / 448) * 448 < amax).any()  # what plain division would let saturate


def test_counts_are_of_every_value():
    x_NGC = some_values()
    counts_GM, counts_1M = count_magnitudes(x_NGC, per_head=True), count_magnitudes(x_NGC, per_head=False)
    assert counts_1M.shape == (1, 32768) and torch.equal(counts_GM.sum(0), counts_1M[0])
    for head in (0, 1):
        values, expected = x_NGC[:, head].abs().flatten().unique(return_counts=True)
        places = counts_GM[head].nonzero().flatten()
        assert torch.equal(magnitudes()[places], values) and torch.equal(counts_GM[head, places], expected)


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.9, 100.0, 0.01])
def test_percentiles_against_sorting(percent):
    x_NGC = some_values()
    ordered = x_NGC.abs().flatten().sort().values
    needed = math.ceil(round(len(ordered) * percent / 100, 6))
    assert float(percentile(count_magnitudes(x_NGC, per_head=False)[0], percent)) == float(ordered[needed - 1])


def test_overflow_and_error_against_every_value():
    x_NGC = some_values()
    counts_M = count_magnitudes(x_NGC, per_head=False)[0]
    for scale in (torch.tensor(0.125), torch.tensor(0.01)):
        read = [nearest(value / float(scale)) * float(scale) for value in x_NGC.flatten().tolist()]
        expected = ((x_NGC.flatten().double() - torch.tensor(read).double()) ** 2).sum()
        assert squared_error(counts_M, scale) == pytest.approx(float(expected), rel=1e-6)
        assert overflow(counts_M, scale) == int((x_NGC.abs() > 448 * scale).sum())
    assert overflow(counts_M, torch.tensor(0.01)) > 0


@pytest.mark.parametrize("power_of_two", [True, False])
def test_least_error_against_brute_force(power_of_two):
    """Finer steps over a wider range find nothing better, with powers of two; without, nothing noticeably better."""
    x_NGC = some_values(1)
    x_NGC[0, 0, 0] = 4096.0  # one outlier: worth saturating, if the rest gains from it
    counts_M, amax = count_magnitudes(x_NGC, per_head=False)[0], x_NGC.abs().max()
    found = least_error_scale(counts_M, amax, power_of_two)

    def error(scale: float) -> float:
        read = (x_NGC / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return float(((x_NGC - read).double() ** 2).sum())

    top = float(amax) / 448
    tried = [2.0**e for e in range(-20, 20)] if power_of_two else [top * 2 ** (i / 64) for i in range(-400, 400)]
    best = min(error(scale) for scale in tried)
    assert error(float(found)) <= best * (1 if power_of_two else 1.03)
    if power_of_two:
        assert math.log2(float(found)).is_integer()
        ties = [scale for scale in tried if error(scale) == best and scale <= top * 2]
        assert float(found) == max(ties)
