"""limits.py: budgets as limits, with the positions of targets, the keys and the units of the user."""

import itertools
from dataclasses import replace

import pytest
from helpers.four_layer_programs import LAYERS, NOTHING, SCENARIO, program

from lit_puzzle.search.limits import describe_all
from lit_puzzle.search.solver import mip
from lit_puzzle.search.solver.choices import InfeasibleError
from lit_puzzle.spec import Budget, Target


def test_targets_are_distinguished():
    twice = [Target(SCENARIO, NOTHING), Target(replace(SCENARIO, tensor_parallel=2, kv_dtype="bfloat16"), NOTHING)]
    other = Target(replace(SCENARIO, prompt_tokens=64), NOTHING)
    assert describe_all([other]) == ["2 x H100 at 64 + 1024 tokens"]
    assert describe_all([*twice, other]) == [
        "target 1: 2 x H100 at 4096 + 1024 tokens, kv_dtype fp8, tensor_parallel None",
        "target 2: 2 x H100 at 4096 + 1024 tokens, kv_dtype bfloat16, tensor_parallel 2",
        "target 3: 2 x H100 at 64 + 1024 tokens",
    ]


def test_a_budget_is_checked_in_its_own_target_only():
    """Two targets that differ in their latency only: the one that cannot be met is named."""
    targets = [Target(SCENARIO, Budget(latency_seconds=100.0)), Target(SCENARIO, Budget(latency_seconds=1e-3))]
    with pytest.raises(InfeasibleError, match=r"tightest budget is 'latency_seconds on target 2: 2 x H100 at 4096"):
        mip.solve(program(*targets, batch_sizes=[1, 8]).problem)


def test_a_missed_throughput_is_reported_in_its_unit_with_the_best_in_reach():
    search = program(Target(SCENARIO, Budget(throughput_over_parent=50.0)), batch_sizes=[4, 16])
    with pytest.raises(
        InfeasibleError, match=r"throughput_over_parent on 2 x H100.*reaches [\d.]+, required is 50 "
    ) as caught:
        mip.solve(search.problem)
    model, parent = search.models[0], search.parents[0]
    assert parent is not None
    plans = itertools.product(*(range(len(row)) for row in LAYERS))
    predicted = [
        model.predict(blocks, *pair)
        for blocks in {tuple(search.blocks(plan)) for plan in plans}
        for pair in search.deployed[0]
    ]
    best = max(p.tokens_per_second for p in predicted if p.fits) / parent.tokens_per_second
    reach = float(str(caught.value).split("deployments at most ")[1].split(" ")[0])
    assert reach == pytest.approx(best, rel=2e-3)
    ((reached, required),) = caught.value.needs.values()
    assert required == pytest.approx(50) and reached < 50


def test_parameters_are_reported_in_units():
    with pytest.raises(
        InfeasibleError, match=r"'total_parameters of limits'.* needs [\d,]{13,}, allowed is 1,000,000 \("
    ):
        mip.solve(program(Target(SCENARIO, NOTHING), limits=Budget(total_parameters=1_000_000)).problem)
