"""The table of scripts/ablations/tiny_rl.py: paired gains with their error over problems, means over seeds."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lit_puzzle.environments.episodes import Episode
from lit_puzzle.environments.verdict import Verdict

SCRIPT = Path(__file__).parents[2] / "scripts" / "ablations" / "tiny_rl.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_rl", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def episodes(*correct: int) -> list[Episode]:
    """Four problems at each effort, with the same verdicts at each."""
    return [
        Episode("chains", effort, problem, Verdict(float(right), "right" if right else "wrong"), 5, "stop", 0, problem)
        for effort in ("low", "medium", "high")
        for problem, right in enumerate(correct)
    ]


def test_gains_of_two_seeds_are_averaged_by_problem_first(script: ModuleType) -> None:
    """By hand: problems gain 1, .5, 0 and -.5; their mean is .25, its error sqrt(1.25 / 3) / 2 = .323."""
    before = episodes(0, 0, 0, 1)
    pairs = [(before, episodes(1, 1, 0, 0)), (before, episodes(1, 0, 0, 1))]
    assert script.gains(pairs) == " / ".join(["+0.250 ± 0.323"] * 3)


def test_mean_over_seeds_has_an_error_where_seeds_differ(script: ModuleType) -> None:
    assert script.across([0.5, 0.5], ".3f") == "0.500"
    assert script.across([1.0, 3.0], ".1f") == "2.0 ± 1.0"
