"""length_rewards.py: every reward of lengths by hand, the parent's lengths, and settings that are refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_puzzle.generation.lengths import LengthStatistics, write_lengths
from lit_puzzle.rl.length_rewards import (
    LengthLimit,
    Looping,
    Overlong,
    budget,
    budget_score,
    length_limit,
    parents_tokens,
)
from lit_puzzle.rl.length_settings import BudgetSettings, EndingSettings, GroupLengthSettings, OverlongSettings
from lit_puzzle.rl.rewards import length_rewards
from lit_puzzle.rl.settings import GRPOLossSettings, RewardSettings


def ids(*lengths: int) -> list[list[int]]:
    return [list(range(length)) for length in lengths]


def test_length_limit_by_hand() -> None:
    reward = LengthLimit(start_tokens={"low": 2.0, "high": 4.0}, end_tokens={"low": 4.0, "high": 8.0})
    efforts = ["low"] * 5 + ["high"] * 3
    expected = [0.0, 0.0, -0.5, -1.0, -1.0, 0.0, -0.25, -1.0]
    assert reward(completion_ids=ids(1, 2, 3, 4, 9, 4, 5, 8), effort=efforts) == expected


def test_limits_are_multiples_of_the_parents_tokens() -> None:
    limit = length_limit(1.5, 2.0, {"high": 4.0})
    assert limit(completion_ids=ids(6, 7, 8), effort=["high"] * 3) == [0.0, -0.5, -1.0]


def test_budgets_by_hand() -> None:
    """The parent has 4 tokens at low and 10 at high effort; the budgets are 4 and 20, the ramps 2 and 5 tokens long."""
    reward = budget(BudgetSettings(weight=1.0, low=1.0, high=2.0, ramp=0.5), {"low": 4.0, "high": 10.0})
    low = reward(completion_ids=ids(1, 4, 5, 6, 60), effort=["low"] * 5)
    assert low == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert reward(completion_ids=ids(6, 20, 21, 25), effort=["high"] * 4) == [0.0, 0.0, -0.2, -1.0]


def test_a_budget_of_the_mean_knows_where_it_counts_in_full() -> None:
    made = budget(BudgetSettings(1.0, low=1.0, mean_ramp=0.25), {"low": 4.0})
    assert (made.start_tokens, made.full_mean_tokens) == ({"low": 4.0}, {"low": 5.0})
    assert budget(BudgetSettings(1.0), {"low": 4.0}).full_mean_tokens == {}


def test_the_best_weights_are_those_within_the_limit() -> None:
    parent = {effort: LengthStatistics(mean, mean, mean) for effort, mean in (("low", 4.0), ("high", 10.0))}
    values = {"val/accuracy": 0.75, "val/tokens/low": 4.4, "val/tokens/high": 12.0, "val/tokens/medium": 99.0}
    limited = BudgetSettings(weight=1.0, best_within=1.2)
    assert budget_score(values, limited, parent) == 0.75
    assert budget_score(values | {"val/tokens/low": 6.0}, limited, parent) == pytest.approx(0.5)  # 6 / 4.8 - 1
    assert budget_score(values | {"val/tokens/high": 99.0}, BudgetSettings(), parent) == 0.75


def test_overlong_is_the_soft_punishment_of_dapo() -> None:
    """Equation 13 with L_max = 20 and L_cache = 5."""
    reward = Overlong(max_new_tokens=20, buffer_tokens=5)
    assert reward(completion_ids=ids(1, 15, 16, 18, 20)) == [0.0, 0.0, -0.2, -0.6, -1.0]


def test_loops_cost_one() -> None:
    loop = [1, 2] * 40
    assert Looping()(completion_ids=[loop, loop[:20], list(range(80)), [3, *loop, 4]]) == [-1.0, 0.0, 0.0, -1.0]


def test_the_parents_lengths_are_needed(tmp_path: Path) -> None:
    def build(settings: RewardSettings, *efforts: str) -> object:
        return length_rewards(settings, efforts, tmp_path, 32)

    limited = RewardSettings(length=0.5)
    for settings in (limited, RewardSettings(budget=BudgetSettings(weight=1.0))):
        with pytest.raises(ValueError, match=r"generation_lengths\.json does not exist"):
            build(settings, "high")
    assert build(RewardSettings(endings=EndingSettings(looping=1.0)), "high")
    write_lengths(tmp_path, {"low": LengthStatistics(4.0, 4.0, 6.0), "high": LengthStatistics(0.0, 0.0, 0.0)})
    with pytest.raises(ValueError, match=r"for \['high', 'low'\], not for \['medium'\]"):
        build(limited, "low", "medium")
    with pytest.raises(ValueError, match=r"gives the parent 0 tokens at \['high'\]"):
        build(limited, "high")
    assert parents_tokens(tmp_path, ["low"]) == {"low": 4.0}
    (tmp_path / "generation_lengths.json").write_text('{"high": 3}')
    with pytest.raises(ValueError, match="Its form is"):
        build(limited, "high")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BudgetSettings(weight=-1.0), r"rewards\.budget\.weight=-1\.0 was given"),
        (lambda: BudgetSettings(weight=math.nan), r"rewards\.budget\.weight=nan was given"),
        (lambda: BudgetSettings(low=0.0), r"low=0\.0, .* all are multiples of the parent's mean tokens, positive"),
        (lambda: BudgetSettings(medium=math.nan), "medium=nan"),
        (lambda: BudgetSettings(ramp=0.0), "ramp=0.0"),
        (lambda: BudgetSettings(high=math.inf), "high=inf"),
        (lambda: BudgetSettings(best_within=0.0), "best_within=0.0"),
        (lambda: BudgetSettings(mean_ramp=-0.1), r"rewards\.budget\.mean_ramp=-0\.1 was given"),
        (lambda: BudgetSettings(mean_ramp=math.nan), "mean_ramp=nan"),
        (lambda: GroupLengthSettings(weight=math.inf), r"rewards\.group_length\.weight=inf was given"),
        (lambda: EndingSettings(looping=-1.0), r"rewards\.endings\.looping=-1\.0 was given"),
        (lambda: EndingSettings(no_analysis=math.inf), r"rewards\.endings\.no_analysis=inf was given"),
        (lambda: EndingSettings(no_analysis_efforts=("most",)), r"no_analysis_efforts=\['most'\] was given"),
        (lambda: EndingSettings(no_analysis_efforts=()), r"no_analysis_efforts=\[\] was given"),
        (lambda: OverlongSettings(weight=math.nan), r"rewards\.overlong\.weight=nan was given"),
        (lambda: OverlongSettings(buffer_tokens=0), r"buffer_tokens=0 was given; at least 1"),
        (lambda: OverlongSettings(0.5, 16).check_cap(16), r"must be below grpo\.sampling\.max_new_tokens=16"),
        (lambda: GRPOLossSettings(aggregation="both"), r"grpo\.loss\.aggregation is 'both'"),  # type: ignore[arg-type]
    ],
)
def test_hostile_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)
