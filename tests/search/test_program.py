"""program.py: every sum of a program against the cost model's own prediction of whole plans."""

import math
import random
from dataclasses import replace

import pytest
from helpers.four_layer_programs import CONFIG, LAYERS, NOTHING, SCENARIO, library, program

from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.engine import GIB
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.costs.serving import Block
from lit_puzzle.search.program import build_program, offered
from lit_puzzle.search.settings import Constraints, SearchSpace
from lit_puzzle.search.solver import mip
from lit_puzzle.search.solver.choices import InfeasibleError
from lit_puzzle.spec import Budget, Scenario, Target

BUDGET = Budget(
    memory_gib=10.0,
    throughput_tokens_per_second=9000.0,
    latency_seconds=3.0,
    total_parameters=8_000_000_000,
    active_parameters=1_500_000_000,
    full_attention_layers=1,
)


def test_every_limit_is_what_the_cost_model_predicts():
    search = program(Target(SCENARIO, BUDGET), batch_sizes=[1, 16, 200])
    model, generator = search.models[0], random.Random(0)
    held = set()
    for _ in range(60):
        plan = [generator.randrange(len(row)) for row in LAYERS]
        blocks = search.blocks(plan)
        for option, (deployment, batch) in zip(search.problem.choices[0], search.deployed[0], strict=True):
            predicted = model.predict(blocks, deployment, batch)
            expected = [
                predicted.memory_gib * GIB / 2 <= model.usable_bytes(deployment),
                predicted.memory_gib <= 10.0,
                predicted.tokens_per_second >= 9000.0,
                predicted.latency_seconds <= 3.0,
            ]
            assert [limit.holds(plan) for limit in option.limits] == expected
            assert option.limits[1].total(plan) == pytest.approx(predicted.memory_gib, rel=1e-12)
            speed = option.limits[2]
            assert speed.in_user_unit(speed.total(plan)) == pytest.approx(predicted.tokens_per_second, rel=1e-12)
            assert speed.in_user_unit(speed.bound) == pytest.approx(9000.0)
            assert option.limits[3].total(plan) == pytest.approx(predicted.latency_seconds, rel=1e-12)
            held |= set(enumerate(expected))
        limits = {limit.key: limit for limit in search.problem.limits}
        assert limits["total_parameters"].total(plan) == predicted.parameters
        assert limits["active_parameters"].total(plan) == predicted.active_parameters
        assert limits["full_attention_layers"].total(plan) == sum(block.window_tokens is None for block in blocks)
    assert {(which, value) for which in (1, 2, 3) for value in (True, False)} <= held  # both sides were seen


def test_the_tighter_of_two_throughputs_holds():
    def room(**budget):
        search = program(Target(SCENARIO, Budget(**budget)), batch_sizes=[16])
        (parent,) = search.parents
        assert parent is not None
        return search.problem.choices[0][0].limits[1].bound, parent.tokens_per_second

    over, parent = room(throughput_over_parent=1.5)
    absolute, _ = room(throughput_tokens_per_second=1.5 * parent)
    assert over == pytest.approx(absolute)
    both, _ = room(throughput_over_parent=1.5, throughput_tokens_per_second=3 * parent)
    assert both == pytest.approx(over / 2)
    assert room(throughput_over_parent=1.5, throughput_tokens_per_second=parent)[0] == pytest.approx(over)


def test_batches_come_from_the_scenario_then_the_list_then_a_ladder():
    fixed = program(Target(replace(SCENARIO, batch_size=7), NOTHING), batch_sizes=[1, 2])
    assert {batch for _, batch in fixed.deployed[0]} == {7}
    given = program(Target(SCENARIO, NOTHING), batch_sizes=[5, 1, 5])
    assert sorted({batch for _, batch in given.deployed[0]}) == [1, 5]
    long = Target(replace(SCENARIO, prompt_tokens=400_000), NOTHING)
    automatic = program(long)
    model = automatic.models[0]
    for deployment in model.deployments():
        batches = [batch for other, batch in automatic.deployed[0] if other == deployment]
        assert len(batches) <= 12 and batches == sorted(batches)
        assert batches[0] == model.largest_batch(automatic.blocks([0] * 4), deployment)
        assert batches[-1] == model.largest_batch(automatic.blocks([len(row) - 1 for row in LAYERS]), deployment)
    assert min(batch for _, batch in program(replace(long, budget=Budget(latency_seconds=9.0))).deployed[0]) == 1


def test_experts_that_cannot_be_split_are_forbidden():
    search = program(Target(replace(SCENARIO, tensor_parallel=2, expert_parallel=2), NOTHING), layers=library().layers)
    (solution,) = mip.solve(search.problem)
    assert solution.quality_loss == 0
    assert not [limit for limit in search.problem.limits if "experts" in limit.name]  # all counts are even
    four = Scenario("H100", 4, 4096, 1024, tensor_parallel=4, expert_parallel=4)
    search = program(Target(four, NOTHING))
    (limit,) = (limit for limit in search.problem.limits if "expert_parallel 4" in limit.name)
    for row, coefficients in zip(LAYERS, limit.coefficients):
        assert [value == math.inf for value in coefficients] == [c.block.num_experts == 30 for c in row]


def test_fewer_experts_than_a_token_is_routed_to_are_a_candidate_that_costs_less():
    """The token is then routed to all that are left, as in a parent that chooses all of its experts."""
    search = program(Target(SCENARIO, NOTHING), layers=library().layers)
    counts = [candidate.block.num_experts for candidate in search.layers[0]]
    assert min(counts) < search.models[0].model.experts_per_token
    (deployment, batch), *_ = search.deployed[0]
    blocks = [Block(count, None) for count in (min(counts), search.models[0].model.experts_per_token)]
    few, enough = (search.models[0].block(block, deployment, batch) for block in blocks)
    assert few.active_parameters < enough.active_parameters and few.decode_seconds < enough.decode_seconds


def test_uniform_experts_and_unchanged_windows():
    layers = offered(library(), "unchanged")
    assert all(c.block.window_tokens == row[0].block.window_tokens for row in layers for c in row)
    assert offered(library(), "free") == library().layers
    # Parameters for about three whole layers of four: uniform has to take 64 everywhere.
    budget = Budget(total_parameters=11_000_000_000)
    search = program(Target(SCENARIO, NOTHING), limits=budget, uniform_experts=True)
    (solution,) = mip.solve(search.problem)
    assert [block.num_experts for block in search.blocks(solution.chosen)] == [64] * 4
    free = program(Target(SCENARIO, NOTHING), limits=budget)
    assert len({block.num_experts for block in free.blocks(mip.solve(free.problem)[0].chosen)}) > 1


def test_where_nothing_fits_memory_is_named():
    small = Target(Scenario("H100", 1, 4096, 1024, expert_dtype="float32", weight_dtype="float32"), NOTHING)
    big = tuple(row[:1] for row in LAYERS) * 30
    with pytest.raises(
        InfeasibleError, match=r"tightest budget is 'memory of each GPU in GiB on 1 x H100 at 4096 \+ 1024 tokens'"
    ):
        mip.solve(program(small, layers=big).problem)
    with pytest.raises(ValueError, match="the parent does not fit there at all; give throughput_tokens_per_second"):
        program(replace(small, budget=Budget(throughput_over_parent=1.1)), layers=big)


def test_an_error_of_the_source_of_times_is_not_taken_for_a_parent_that_does_not_fit():
    class UpToEight(Roofline):
        def decode_layer(self, setting, block, batch_size, context_tokens):
            if batch_size > 8:
                raise ValueError(f"timed up to batch 8, not {batch_size}; set engine.max_sequences")
            return super().decode_layer(setting, block, batch_size, context_tokens)

    target = Target(SCENARIO, Budget(throughput_over_parent=1.1))
    model = CostModel(ModelShape.from_config(CONFIG), SCENARIO, UpToEight())
    with pytest.raises(ValueError, match=r"timed up to batch 8, not 9; set engine\.max_sequences"):
        build_program(LAYERS, [[0.0] * len(row) for row in LAYERS], [model], Constraints([target]), SearchSpace())
