"""patience.py: every value that is no time to wait is one line, for the strategy of training and for Fabric."""

import math
from datetime import timedelta
from typing import Any

import pytest

from lit_puzzle.training.fabric import FabricSettings
from lit_puzzle.training.patience import patience
from lit_puzzle.training.sharding import Sharded

HOSTILE: list[Any] = [0, -1, math.nan, math.inf, -math.inf, 1e300, 1e-9, "x", True, None]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_are_one_line(value: Any) -> None:
    for make, where in (
        (lambda: FabricSettings(timeout_hours=value), "fabric"),
        (lambda: Sharded(timeout_hours=value), "strategy"),
    ):
        with pytest.raises(ValueError, match=f"^{where}: timeout_hours .* was given; allowed are hours") as refused:
            make()
        assert "\n" not in str(refused.value)


def test_times_are_times() -> None:
    assert patience("fabric", 1.5) == timedelta(hours=1.5) and patience("fabric", 8784) == timedelta(days=366)
