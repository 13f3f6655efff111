"""Finds values that no trained weight has: NaN, infinities, and MXFP4 scales that stand for them.

One NaN in a checkpoint makes every answer empty or arbitrary, and nothing fails. A float tensor is checked by its
smallest and its largest value, which are NaN where any value is: one pass without a copy, 17 GB/s (bfloat16) and
32 GB/s (float32) on one core, where copying the same bytes from the page cache into memory takes 2 GB/s
(`scripts/bench/weight_checks.py`). Of MXFP4 only the scales are looked at, 1 byte of 17. Reads and writes nothing.

Source: OCP Microscaling Formats (MX) v1.0, section 5.4 (a scale byte of 255 is NaN).
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SCALE = 252  # 6 x 2^(252 - 127) is the largest value that bfloat16 holds; 253 and 254 overflow, 255 is NaN


def check_computed(name: str, values: Tensor) -> None:
    """Check a tensor that was computed and is about to be written.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if values.is_floating_point() and not is_finite(values.detach()):
        raise ValueError(
            f"{name} would be written with values that are NaN or infinite: the training diverged, or its dtype cannot "
            "hold them"
        )


def has_values(name: str, dtype: str) -> bool:
    """Return whether some bytes of a tensor of this dtype code are refused; those of MXFP4 blocks all are allowed."""
    return dtype != "U8" or name.endswith("_scales")


def is_finite(values: Tensor) -> bool:
    """Return whether no value of a tensor is NaN or infinite."""
    if values.numel() == 0 or not values.is_floating_point():
        return True
    return bool(torch.stack(values.detach().aminmax()).isfinite().all())


def check_values(name: str, values: Tensor, where: object) -> None:
    """Check the values of a tensor, or of some of its rows, as it is stored.

    Args:
        name: of the tensor; `*_scales` in bytes are scales of MXFP4.
        values: the tensor.
        where: its file, for the message.

    Raises:
        ValueError: it has NaN or infinities, or a scale above 252.
    """
    if values.dtype == torch.uint8 and name.endswith("_scales"):
        largest = int(values.max()) if values.numel() else 0
        if largest > MAX_SCALE:
            meaning = "NaN" if largest == 255 else "values beyond the largest number of bfloat16"
            raise ValueError(f"{where}: {name} has a scale byte of {largest}, which stands for {meaning}")
    elif not is_finite(values):
        broken = int((~values.isfinite()).sum())
        kind = "NaN" if bool(values.isnan().any()) else "infinite"
        raise ValueError(
            f"{where}: {name} has {broken} of {values.numel()} values that are not finite ({kind}); "
            "copy or download the file again, or export the checkpoint again"
        )
