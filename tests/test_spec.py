"""Plans, scenarios and budgets: JSON round trips, refusals that name what is wrong, and an import without torch."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_puzzle.spec import BlockSpec, Budget, Plan, Scenario, Target

block_specs = st.builds(
    BlockSpec,
    st.sets(st.integers(0, 127), min_size=1).map(lambda kept: tuple(sorted(kept))),
    st.none() | st.integers(1, 131072),
)


@given(st.lists(block_specs, min_size=1, max_size=5))
def test_plan_survives_json_text(blocks: list[BlockSpec]) -> None:
    plan = Plan("fingerprint", 128, tuple(blocks))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_scenario_and_budget_survive_json_text() -> None:
    scenario = Scenario("H100", 8, 65536, 65536, batch_size=None, kv_dtype="fp8")
    budget = Budget(memory_gib=80.0, total_parameters=88_000_000_000)
    assert Scenario.from_json(json.loads(json.dumps(scenario.to_json()))) == scenario
    assert Budget.from_json(json.loads(json.dumps(budget.to_json()))) == budget
    assert scenario.total_tokens == 131072


def test_plan_file_round_trip_and_plan_inside_a_search_result(tmp_path: Path) -> None:
    plan = Plan("abc", 4, (BlockSpec((0, 3), None), BlockSpec((1,), 128)))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    (tmp_path / "search.json").write_text(json.dumps({"plan": plan.to_json(), "optimality": "proven"}))
    assert Plan.load(tmp_path / "search.json") == plan
    assert plan.block_configs() == [
        {"num_local_experts": 2, "sliding_window": None},
        {"num_local_experts": 1, "sliding_window": 128},
    ]


@pytest.mark.parametrize(
    ("experts", "window", "message"),
    [
        ((), None, "empty"),
        ((1, 0), None, "ascend"),
        ((2, 2), None, "ascend"),
        ((-1, 2), None, "-1"),
        ((0, 1.5), None, "1.5"),
        ((True,), None, "True"),
        ((0,), 0, "window_tokens"),
        ((0,), 8.0, "window_tokens"),
    ],
)
def test_impossible_block_is_refused(experts: Any, window: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockSpec(experts, window)


def test_plan_refuses_experts_the_parent_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"layer 1 keeps expert 4.*0\.\.3"):
        Plan("abc", 4, (BlockSpec((0,), None), BlockSpec((4,), None)))
    with pytest.raises(ValueError, match="blocks is empty"):
        Plan("abc", 4, ())
    with pytest.raises(ValueError, match="parent_fingerprint"):
        Plan("", 4, (BlockSpec((0,), None),))


def test_json_with_unknown_or_missing_keys_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"BlockSpec: unknown key.*window'.*window_tokens"):
        BlockSpec.from_json({"experts": [0], "window": 4})
    with pytest.raises(ValueError, match=r"Plan: missing key.*num_parent_experts"):
        Plan.from_json({"parent_fingerprint": "abc", "blocks": []})
    with pytest.raises(ValueError, match=r"expected a JSON object, got list"):
        Budget.from_json([])  # type: ignore[arg-type]


def test_plan_file_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no plan at .*nothing\.json; make one with recipes/search\.yaml"):
        Plan.load(tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not JSON"):
        Plan.load(tmp_path / "bad.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"other\.json: Plan: unknown key.*'a'"):
        Plan.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    "change",
    [
        {"num_gpus": 0},
        {"batch_size": 0},
        {"kv_dtype": "int3"},
        {"prompt_tokens": 0, "generated_tokens": 0},
        {"gpu": ""},
    ],
)
def test_impossible_scenario_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Scenario(**{"gpu": "H100", "num_gpus": 1, "prompt_tokens": 8, "generated_tokens": 8, **change})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Budget)])
def test_impossible_budget_is_refused_by_field(field: str) -> None:
    for value in (-1, float("nan"), float("inf"), "8", True):
        wrong: dict[str, Any] = {field: value}
        with pytest.raises(ValueError, match=field):
            Budget(**wrong)


def test_zero_is_no_budget_except_for_layers() -> None:
    assert Budget(full_attention_layers=0).full_attention_layers == 0
    with pytest.raises(ValueError, match="memory_gib must be positive"):
        Budget(memory_gib=0)


def test_specs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BlockSpec((0,), None).window_tokens = 4  # type: ignore[misc]


def test_a_target_survives_json_and_refuses_unknown_keys() -> None:
    target = Target(Scenario("H100", 8, 65536, 65536, expert_dtype="bfloat16"), Budget(throughput_over_parent=1.6))
    assert Target.from_json(json.loads(json.dumps(target.to_json()))) == target
    with pytest.raises(ValueError, match=r"unknown key.*'speed'"):
        Target.from_json({**target.to_json(), "speed": 1})
    with pytest.raises(ValueError, match=r"expert_dtype 'int3'.*mxfp4"):
        Scenario("H100", 8, 1, 1, expert_dtype="int3")
