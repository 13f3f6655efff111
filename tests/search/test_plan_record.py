"""plan_record.py: the content of plan.json against the cost model, and what the check of totals catches."""

from dataclasses import replace

import pytest
from helpers.four_layer_programs import CONFIG, SCENARIO, library

from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.search.plan_record import check_totals, plan_record, results
from lit_puzzle.search.program import build_program
from lit_puzzle.search.report import SweepPoint
from lit_puzzle.search.settings import Constraints, SearchSpace
from lit_puzzle.search.solver import mip
from lit_puzzle.search.solver.choices import DisagreementError
from lit_puzzle.spec import Budget, Plan, Target

SERVABLE = replace(
    library(), layers=tuple(tuple(c for c in row if c.block.num_experts > 2) for row in library().layers)
)


@pytest.fixture(scope="module")
def solved():
    target = Target(SCENARIO, Budget(throughput_over_parent=1.05, total_parameters=9_000_000_000))
    model = CostModel(ModelShape.from_config(CONFIG), SCENARIO, Roofline())
    quality_loss = [[float(index) for index in range(len(row))] for row in SERVABLE.layers]
    program = build_program(SERVABLE.layers, quality_loss, [model], Constraints([target]), SearchSpace())
    return program, mip.solve(program.problem)[0]


def test_record_and_results(solved):
    program, solution = solved
    record = plan_record(
        SERVABLE, program, [solution], [SweepPoint(1.1, None, False)], {"solver": "mip", "seconds": 0.1}
    )
    blocks, model = program.blocks(solution.chosen), program.models[0]
    assert [block.num_experts for block in Plan.from_json(record["plan"]).blocks] == [b.num_experts for b in blocks]
    (row,) = record["predicted"]
    assert row["child"] == model.best(blocks).to_json()
    assert row["speedup"] == row["child"]["tokens_per_second"] / row["parent"]["tokens_per_second"] >= 1.05 - 1e-9
    assert row["required_tokens_per_second"] == pytest.approx(1.05 * row["parent"]["tokens_per_second"])
    assert [entry["quality_loss"] for entry in record["scores"]] == [float(index) for index in solution.chosen]
    assert record["sweep"] == [{"throughput_over_parent": 1.1, "quality_loss": None, "proven": False}]
    numbers = results(record)
    assert numbers["quality_loss"] == sum(solution.chosen) and numbers["proven"] == 1.0
    assert numbers["parameters"] <= 9_000_000_000 and numbers["speedup/0"] == row["speedup"]


def test_a_bounded_latency_keeps_the_batch_that_was_chosen(solved):
    program, _ = solved
    slow = Target(SCENARIO, Budget(latency_seconds=4.0))
    again = build_program(
        SERVABLE.layers,
        program.problem.quality_loss,
        program.models,
        Constraints([slow]),
        SearchSpace(batch_sizes=[1, 8]),
    )
    (solution,) = mip.solve(again.problem)
    record = plan_record(SERVABLE, again, [solution], [], {"solver": "mip", "seconds": 0.1})
    child = record["predicted"][0]["child"]
    assert child["batch_size"] in (1, 8) and child["latency_seconds"] <= 4.0


def test_an_option_that_does_not_hold_is_caught(solved):
    program, solution = solved
    check_totals(program, solution)
    big = replace(program, constraints=Constraints([Target(SCENARIO, Budget(total_parameters=9_000_000_000))]))
    with pytest.raises(DisagreementError, match="total_parameters is"):
        check_totals(big, replace(solution, chosen=(0,) * 4))
    worst = min(
        range(len(program.deployed[0])), key=lambda i: program.models[0].predict(
            program.blocks(solution.chosen), *program.deployed[0][i]).tokens_per_second
    )  # fmt: skip
    with pytest.raises(DisagreementError, match="tokens a second, throughput_over_parent requires"):
        check_totals(program, replace(solution, options=(worst,)))


def test_coefficients_of_another_deployment_are_caught(solved):
    program, solution = solved
    index = solution.options[0]
    other = next(
        i for i, (deployment, _) in enumerate(program.deployed[0]) if deployment != program.deployed[0][index][0]
    )
    swapped = list(program.problem.choices[0])
    swapped[index] = swapped[other]
    wrong = replace(program, problem=replace(program.problem, choices=(tuple(swapped),)))
    with pytest.raises(DisagreementError, match="GiB"):
        check_totals(wrong, solution)


EVERYTHING = Budget(
    memory_gib=150.0,
    throughput_over_parent=0.2,
    latency_seconds=600.0,
    total_parameters=9_000_000_000,
    active_parameters=5_000_000_000,
    full_attention_layers=1,
)


def spoiled(limit, chosen):
    """Return the limit with one coefficient of the plan changed by a fraction of the total."""
    grid = [list(row) for row in limit.coefficients]
    grid[2][chosen[2]] += 1e-3 * (limit.total(chosen) or 1.0)
    return replace(limit, coefficients=grid)


@pytest.fixture(scope="module")
def with_everything():
    limits = Budget(total_parameters=9_000_000_000, active_parameters=4_900_000_000, full_attention_layers=2)
    scenario = replace(SCENARIO, num_gpus=4, tensor_parallel=4, expert_parallel=4)
    targets = [Target(scenario, EVERYTHING), Target(scenario, Budget(throughput_tokens_per_second=10.0))]
    model = CostModel(ModelShape.from_config(CONFIG), scenario, Roofline())
    quality_loss = [[float(index) for index in range(len(row))] for row in library().layers]
    space = SearchSpace(batch_sizes=[1, 8, 64])
    program = build_program(library().layers, quality_loss, [model] * 2, Constraints(targets, limits), space)
    (solution,) = mip.solve(program.problem)
    check_totals(program, solution)
    return program, solution


KEYS = [
    "memory of each GPU in GiB",
    "memory_gib",
    "throughput_over_parent",
    "throughput_tokens_per_second",
    "latency_seconds",
    "total_parameters",
    "active_parameters",
    "full_attention_layers",
    "servable",
]


@pytest.mark.parametrize("key", KEYS)
def test_every_kind_of_coefficient_is_checked(with_everything, key):
    program, solution = with_everything
    always = list(program.problem.limits)
    choices = [list(options) for options in program.problem.choices]
    found = 0
    for index, limit in enumerate(always):
        if limit.key == key:
            changed = [*always[:index], spoiled(limit, solution.chosen), *always[index + 1 :]]
            wrong = replace(program, problem=replace(program.problem, limits=tuple(changed)))
            with pytest.raises(DisagreementError, match="the solver counted"):
                check_totals(wrong, solution)
            found += 1
    for position, taken in enumerate(solution.options):
        limits = choices[position][taken].limits
        for index, limit in enumerate(limits):
            if limit.key == key:
                spoilt = (*limits[:index], spoiled(limit, solution.chosen), *limits[index + 1 :])
                options = list(choices[position])
                options[taken] = replace(options[taken], limits=spoilt)
                others = [*choices[:position], options, *choices[position + 1 :]]
                problem = replace(program.problem, choices=tuple(tuple(each) for each in others))
                with pytest.raises(DisagreementError, match="the solver counted"):
                    check_totals(replace(program, problem=problem), solution)
                found += 1
    assert found


def test_budgets_that_the_problem_lacks_are_checked(with_everything):
    program, solution = with_everything
    without_limits = replace(program, problem=replace(program.problem, limits=()))
    check_totals(without_limits, solution)
    for budget in (Budget(total_parameters=1), Budget(active_parameters=1), Budget(full_attention_layers=0)):
        full = replace(solution, chosen=(0,) * 4)
        with pytest.raises(DisagreementError, match="misses its budget"):
            check_totals(replace(without_limits, constraints=replace(program.constraints, limits=budget)), full)


def test_experts_that_cannot_be_split_or_are_not_uniform_are_caught(with_everything):
    program, solution = with_everything
    few = replace(solution, chosen=(*solution.chosen[:3], 3))  # 2 experts, which 4 ranks cannot share
    assert program.layers[3][3].block.num_experts == 2
    with pytest.raises(DisagreementError, match="layer 3 of the plan has 2 experts"):
        check_totals(program, few)
    labels = tuple(tuple(0 for _ in row) for row in program.layers)
    mixed = replace(solution, chosen=(0, 0, 0, 1))
    with pytest.raises(DisagreementError, match="uniform_experts is set"):
        check_totals(replace(program, problem=replace(program.problem, labels=labels)), mixed)
