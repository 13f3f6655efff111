"""MXFP4 against transformers bit for bit, and rounding against a search over all codes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations import mxfp4 as stock

from lit_puzzle.model.mxfp4 import dequantize, expert_weight, quantize, quantize_experts


def same_bits(left: Tensor, right: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[left.dtype.itemsize]
    return left.dtype == right.dtype and torch.equal(left.contiguous().view(kind), right.contiguous().view(kind))


def all_bytes_times_all_scales() -> tuple[Tensor, Tensor]:
    """[1, 256 scales, 16 groups, 16 bytes]: each of the 256 bytes under each of the 256 scales."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    return blocks, scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_every_byte_under_every_scale_equals_transformers(dtype: torch.dtype) -> None:
    blocks, scales = all_bytes_times_all_scales()
    ours, theirs = expert_weight(blocks, scales, dtype), stock.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert not theirs.isnan().any()
    assert same_bits(ours, theirs)


def test_random_experts_equal_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (5, 12, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(90, 140, (5, 12, 3), dtype=torch.uint8, generator=generator)
    ours = expert_weight(blocks, scales)
    assert ours.shape == (5, 96, 12) and ours.is_contiguous()
    assert same_bits(ours, stock.convert_moe_packed_tensors(blocks, scales))
    assert same_bits(dequantize(blocks[2], scales[2]), ours[2].T)
    assert same_bits(dequantize(blocks[2, 3], scales[2, 3]), ours[2, :, 3])


def test_a_byte_by_hand() -> None:
    blocks = torch.zeros(1, 16, dtype=torch.uint8)
    blocks[0, 0] = 0xD2  # low half 2 -> 1.0, high half 13 -> -3.0
    values = dequantize(blocks, torch.tensor([128], dtype=torch.uint8), torch.float32)
    assert values[:3].tolist() == [2.0, -6.0, 0.0]


def test_values_that_came_from_mxfp4_go_back_exactly() -> None:
    blocks, scales = all_bytes_times_all_scales()
    blocks, scales = blocks[:, 4:250], scales[:, 4:250]
    values = dequantize(blocks, scales, torch.float32)
    again = dequantize(*quantize(values), torch.float32)
    assert same_bits(values, again)  # the sign of zero included
    weight = expert_weight(blocks, scales)
    assert same_bits(expert_weight(*quantize_experts(weight)), weight)


def test_rounding_is_to_the_nearest_code_ties_to_even() -> None:
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.linspace(-6, 6, 1201)
    values = torch.cat([values, (magnitudes[1:] + magnitudes[:-1]) / 2])
    values = torch.cat([values, torch.full((-len(values) % 31,), 0.3)]).view(-1, 31)
    values = torch.cat([values, torch.full((len(values), 1), 6.0)], dim=1)  # fixes the scale at 2^0
    blocks, scales = quantize(values)
    assert scales.eq(127).all()
    rounded = dequantize(blocks, scales, torch.float32)
    distance = (values.abs().unsqueeze(-1) - magnitudes).abs()
    even_first = distance + torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]) * 1e-7  # a tie goes to the even code
    assert torch.equal(rounded.abs(), magnitudes[even_first.argmin(-1)])
    assert torch.equal(torch.signbit(rounded), torch.signbit(values))


@pytest.mark.parametrize("spread", [1e-30, 1e-3, 1.0, 1e20])
def test_error_bound_and_smallest_scale_without_clipping(spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(64, 96, generator=generator) * spread
    blocks, scales = quantize(values)
    error = (values - dequantize(blocks, scales, torch.float32)).abs()
    step = torch.pow(2.0, scales.int() - 127).repeat_interleave(32, -1)
    assert (error <= torch.maximum(values.abs() / 5, step / 4) * (1 + 1e-6)).all()
    largest = values.abs().view(64, 3, 32).amax(-1)
    power = torch.pow(2.0, scales.int() - 127)
    assert (largest <= 6 * power).all() and (largest > 3 * power).all()


def test_zeros_stay_zeros_and_extremes_stay_finite() -> None:
    blocks, scales = quantize(torch.zeros(2, 32))
    assert not blocks.any() and not scales.any()
    extreme = torch.full((1, 32), 2e38)
    assert dequantize(*quantize(extreme), torch.float32).isfinite().all()
    tiny = torch.full((1, 32), 1e-45)
    assert not dequantize(*quantize(tiny), torch.float32).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.ones(2, 33)), "multiple of 32"),
        (lambda: quantize(torch.ones(2, 32, dtype=torch.int32)), "torch.int32"),
        (lambda: quantize(torch.full((1, 32), float("nan"))), "NaN"),
        (lambda: dequantize(torch.zeros(2, 16), torch.zeros(2, dtype=torch.uint8)), "torch.float32"),
        (lambda: dequantize(torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)), r"\(2, 8\)"),
        (lambda: dequantize(torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)), r"\(3,\)"),
    ],
)
def test_what_is_no_mxfp4_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
