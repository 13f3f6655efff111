"""How the scales of an FP8 KV cache follow from calibration data, as recipes hold it. Imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScaleSettings:
    """How scales follow from calibration data.

    Args:
        method: `amax` sets scales so that nothing saturates; `percentile` lets the values beyond `percent` saturate;
            `mse` minimizes the squared error of all values.
        rounding: `power_of_two` rounds scales up (with `mse`, only powers of two are tried); `none` leaves them.
        percent: share of the values of a layer, in (0, 100], that `percentile` represents without saturation.
        per_head: one scale for each key/value head instead of one for the layer, which is what every engine supports.
        windowed_layers: `bf16` leaves the cache of windowed layers, which is small, in bfloat16.

    Raises:
        ValueError: `percent` is outside (0, 100].
    """

    method: Literal["amax", "percentile", "mse"] = "amax"
    rounding: Literal["power_of_two", "none"] = "power_of_two"
    percent: float = 99.99
    per_head: bool = False
    windowed_layers: Literal["fp8", "bf16"] = "fp8"

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent={self.percent} was given; it must be above 0 and at most 100.")
