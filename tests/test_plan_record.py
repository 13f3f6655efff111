"""What plan.json holds, against the cost model; and what the check of totals catches."""

from dataclasses import replace

import pytest
from test_problem import CONFIG, SCENARIO, library

from lit_puzzle.search import mip
from lit_puzzle.search.cost import CostModel, ModelShape
from lit_puzzle.search.costs.roofline import Roofline
from lit_puzzle.search.plan_record import check_totals, headline, plan_record
from lit_puzzle.search.problem import write_problem
from lit_puzzle.search.search_report import SweepPoint
from lit_puzzle.spec import Budget, Plan, Target

SERVABLE = replace(
    library(), layers=tuple(tuple(c for c in row if c.block.num_experts > 2) for row in library().layers)
)


@pytest.fixture(scope="module")
def solved():
    target = Target(SCENARIO, Budget(throughput_over_parent=1.05, total_parameters=9_000_000_000))
    model = CostModel(ModelShape.from_config(CONFIG), SCENARIO, Roofline())
    damage = [[float(index) for index in range(len(row))] for row in SERVABLE.layers]
    written = write_problem(SERVABLE.layers, damage, [target], [model], Budget())
    return written, mip.solve(written.problem)[0]


def test_record_and_headline(solved):
    written, solution = solved
    record = plan_record(
        SERVABLE, written, [solution], [SweepPoint(1.1, None, False)], {"solver": "mip", "seconds": 0.1}
    )
    blocks, model = written.blocks(solution.chosen), written.models[0]
    assert [block.num_experts for block in Plan.from_json(record["plan"]).blocks] == [b.num_experts for b in blocks]
    (row,) = record["predicted"]
    assert row["child"] == model.best(blocks).to_json()
    assert row["speedup"] == row["child"]["tokens_per_second"] / row["parent"]["tokens_per_second"] >= 1.05 - 1e-9
    assert row["required_tokens_per_second"] == pytest.approx(1.05 * row["parent"]["tokens_per_second"])
    assert [entry["damage"] for entry in record["scores"]] == [float(index) for index in solution.chosen]
    assert record["sweep"] == [{"throughput_over_parent": 1.1, "damage": None, "proven": False}]
    numbers = headline(record)
    assert numbers["damage"] == sum(solution.chosen) and numbers["proven"] == 1.0
    assert numbers["parameters"] <= 9_000_000_000 and numbers["speedup/0"] == row["speedup"]


def test_a_bounded_latency_keeps_the_batch_that_was_chosen(solved):
    written, _ = solved
    slow = Target(SCENARIO, Budget(latency_seconds=4.0))
    again = write_problem(SERVABLE.layers, written.problem.damage, [slow], written.models, Budget(), batch_sizes=[1, 8])
    (solution,) = mip.solve(again.problem)
    record = plan_record(SERVABLE, again, [solution], [], {"solver": "mip", "seconds": 0.1})
    child = record["predicted"][0]["child"]
    assert child["batch_size"] in (1, 8) and child["latency_seconds"] <= 4.0


def test_an_option_that_does_not_hold_is_caught(solved):
    written, solution = solved
    check_totals(written, solution)
    big = replace(written, targets=(Target(SCENARIO, Budget(total_parameters=9_000_000_000)),))
    with pytest.raises(mip.DisagreementError, match="total_parameters"):
        check_totals(big, replace(solution, chosen=(0,) * 4))
    worst = min(
        range(len(written.deployed[0])), key=lambda i: written.models[0].predict(
            written.blocks(solution.chosen), *written.deployed[0][i]).tokens_per_second
    )  # fmt: skip
    with pytest.raises(mip.DisagreementError, match="seconds per token"):
        check_totals(written, replace(solution, options=(worst,)))


def test_coefficients_of_another_deployment_are_caught(solved):
    written, solution = solved
    index = solution.options[0]
    other = next(
        i for i, (deployment, _) in enumerate(written.deployed[0]) if deployment != written.deployed[0][index][0]
    )
    swapped = list(written.problem.choices[0])
    swapped[index] = swapped[other]
    wrong = replace(written, problem=replace(written.problem, choices=(tuple(swapped),)))
    with pytest.raises(mip.DisagreementError, match="GiB"):
        check_totals(wrong, solution)
