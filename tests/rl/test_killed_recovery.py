"""RL recovery killed in a rollout, a loss, a backward pass, an update and a checkpoint: resumed, it is the same run."""

import random
from pathlib import Path
from typing import Any

import pytest
from helpers.killed_recovery import KINDS, Kills
from helpers.recovery_runs import make_child


@pytest.mark.parametrize(("lora", "processes", "kinds"), [(True, 1, KINDS), (False, 2, ("rollout", "file"))])
@pytest.mark.slow
def test_a_killed_run_ends_the_same(
    tiny_config: Any, tmp_path: Path, lora: bool, processes: int, kinds: tuple[str, ...]
) -> None:
    """More: `python scripts/faults.py rl --trials=20`."""
    child = make_child(tmp_path / "child", tiny_config(num_hidden_layers=2))
    kills = Kills(tmp_path / "runs", child, lora, processes)
    draw = random.Random(5)
    for kind in kinds:
        moment = kills.draw(draw, kind)
        assert kills.wrong(moment) == "", moment
