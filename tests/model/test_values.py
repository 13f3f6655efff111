import pytest
import torch

from lit_puzzle.model.mxfp4 import dequantize
from lit_puzzle.model.values import MAX_SCALE, check_computed, check_values, has_values, is_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 517, 1023])
def test_one_value_among_many_is_found(dtype: torch.dtype, place: int) -> None:
    values = torch.linspace(-5, 5, 1024, dtype=dtype).view(32, 32)
    check_values("a", values, "file")
    for broken, kind in ((float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")):
        spoiled = values.clone()
        spoiled.view(-1)[place] = broken
        assert is_finite(values) and not is_finite(spoiled)
        with pytest.raises(ValueError, match=rf"^file: a has 1 of 1024 values that are not finite \({kind}\)"):
            check_values("a", spoiled, "file")
        with pytest.raises(ValueError, match="a would be written with values that are NaN or infinite"):
            check_computed("a", spoiled.requires_grad_())


def test_largest_values_and_empty_tensors_are_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert is_finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.empty(0, 4)) and is_finite(torch.tensor(1.0)) and not is_finite(torch.tensor(torch.nan))


def test_scale_limit_is_the_largest_that_never_overflows() -> None:
    blocks = torch.full((1, 16), 0x77, dtype=torch.uint8)  # every value is 6
    scale = torch.tensor([MAX_SCALE], dtype=torch.uint8)
    assert dequantize(blocks, scale).isfinite().all() and not dequantize(blocks, scale + 1).isfinite().all()
    check_values("a_scales", scale, "file")
    for byte, meaning in ((253, "beyond the largest number"), (254, "beyond the largest number"), (255, "NaN")):
        with pytest.raises(ValueError, match=f"a_scales has a scale byte of {byte}, which stands for .*{meaning}"):
            check_values("a_scales", torch.tensor([1, byte, 2], dtype=torch.uint8), "file")


def test_bytes_of_mxfp4_blocks_are_all_allowed() -> None:
    check_values("a_blocks", torch.arange(256, dtype=torch.uint8), "file")
    assert not has_values("a_blocks", "U8") and has_values("a_scales", "U8") and has_values("a", "BF16")
