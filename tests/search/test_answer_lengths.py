"""answer_lengths.py: requests a second as a budget, against every plan by definition; lengths read from scores."""

import itertools
import random
from dataclasses import replace

import pytest
from helpers.four_layer_programs import CONFIG, LAYERS, SCENARIO, library

from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.library.library import parts
from lit_puzzle.scoring.scores import Measurement, Scores
from lit_puzzle.search import refine
from lit_puzzle.search.answer_lengths import REQUESTS, AnswerLengths, answer_lengths, by_length, product
from lit_puzzle.search.plan_record import check_totals, plan_record, results
from lit_puzzle.search.program import build_program
from lit_puzzle.search.report import write_table
from lit_puzzle.search.settings import Constraints, SearchSpace
from lit_puzzle.search.solver import mip
from lit_puzzle.search.solver.choices import DisagreementError, InfeasibleError, Limit, Option
from lit_puzzle.search.solver.settings import SolverSettings
from lit_puzzle.spec import Budget, Target

FIXED = replace(SCENARIO, batch_size=64)
PLANS = list(itertools.product(*(range(len(row)) for row in LAYERS)))


def program(over_parent, changes, seed=0, tried=None, scenario=FIXED):
    target = Target(scenario, Budget(requests_over_parent=over_parent))
    model, draw = CostModel(ModelShape.from_config(CONFIG), scenario, Roofline()), random.Random(seed)
    losses = [[0.0, *(draw.random() for _ in row[1:])] for row in LAYERS]
    lengths = None if changes is None else [AnswerLengths(changes)]
    return build_program(LAYERS, losses, [model], Constraints([target]), SearchSpace(), tried, lengths)


def drawn(seed, most=0.3):
    draw = random.Random(seed)
    return [[0.0, *(draw.uniform(-most, most) for _ in row[1:])] for row in LAYERS]


def best_by_definition(search, over_parent, changes):
    """Return the least loss of all plans whose requests a second, predicted plan by plan, meet the budget."""
    model, parent, found = search.models[0], search.parents[0], []
    for plan in PLANS:
        ratio = 1 + sum(row[index] for row, index in zip(changes, plan))
        speeds = [
            p.tokens_per_second
            for pair in set(search.deployed[0])
            if (p := model.predict(search.blocks(plan), *pair)).fits
        ]
        if ratio > 0.25 and speeds and max(speeds) / parent.tokens_per_second / ratio >= over_parent:
            found.append(search.problem.total_quality_loss(plan))
    return min(found)


@pytest.mark.parametrize("seed", range(6))
def test_the_plan_is_the_best_that_meets_the_requests(seed):
    changes, over_parent = drawn(seed), (0.9, 1.05, 1.3)[seed % 3]
    search = program(over_parent, changes, seed)
    (found,) = mip.solve(search.problem)
    check_totals(search, found)
    assert found.proven and found.quality_loss >= best_by_definition(search, over_parent, changes) - 1e-9
    assert found.quality_loss <= best_by_definition(search, over_parent * 1.0004, changes) + 1e-9


@pytest.mark.parametrize("most", [0.8, 1.2])
@pytest.mark.parametrize("seed", range(4))
def test_plans_that_would_leave_no_answers_are_none(seed, most):
    changes = [[-abs(change) for change in row] for row in drawn(seed, most)]
    search = program(1.05, changes, seed)
    (found,) = mip.solve(search.problem)
    check_totals(search, found)
    assert AnswerLengths(changes).ratio(found.chosen) >= 0.25 - 1e-9
    assert found.quality_loss == pytest.approx(best_by_definition(search, 1.05, changes), abs=1e-9)


def test_lengths_change_the_plan():
    """With answers as long as the parent's it is the throughput that counts; longer ones must be paid in speed."""
    plain = mip.solve(program(1.3, None).problem)[0]
    same = mip.solve(program(1.3, [[0.0] * len(row) for row in LAYERS]).problem)[0]
    assert plain.quality_loss == same.quality_loss
    longer = [[0.2 * index for index in range(len(row))] for row in LAYERS]
    assert mip.solve(program(1.3, [[-c for c in row] for row in longer]).problem)[0].quality_loss < plain.quality_loss
    with pytest.raises(InfeasibleError, match=r"requests_over_parent on 2 x H100"):
        mip.solve(program(1.3, longer).problem)


def test_the_first_order_form_is_the_product_where_it_touches():
    # 3 seconds at 1.2 times the length, around 1.2 and a bound of 3.6: exactly 3.6; elsewhere less than the product
    assert product(3.0, 1.2, 1.2, 3.6) == pytest.approx(3.6)
    for seconds, ratio in ((3.0, 1.5), (2.0, 0.8), (3.5, 1.0), (2.9, 1.3)):
        close = product(seconds, ratio, 1.2, 3.6)
        assert close == pytest.approx(seconds * ratio - (seconds - 3.0) * (ratio - 1.2))
        assert close > 3.6 or seconds * ratio <= 3.6


def test_levels_span_what_can_matter():
    limit = Limit("requests", [[2.0, 1.0], [2.0, 1.0]], 0.0, 3.0, REQUESTS)
    options = by_length(Option("batch 1", (limit,)), AnswerLengths([[0.0, 0.2], [0.0, -0.1]]))
    levels = [level for _, level in options]
    assert levels[0] <= 0.9 <= levels[1] and levels[-2] < 1.2 <= levels[-1]  # 3 / 2 could be afforded, 1.2 is reached
    assert all(option.limits[0].bound == 3.0 for option, _ in options)
    tight = [level for _, level in by_length(Option("", (replace(limit, bound=2.0),)), AnswerLengths([[0, 9], [0, 9]]))]
    assert tight[-1] == 1.0  # with 2 of 2 seconds used by the fastest blocks, answers cannot get longer
    assert by_length(Option("", ()), AnswerLengths([[0.0]])) == [(Option("", ()), 1.0)]


def test_refinement_keeps_the_length_of_the_plan(tmp_path):
    changes = drawn(1)

    def build(tried=None):
        return program(1.05, changes, tried=tried, scenario=SCENARIO)

    found, (best, *others) = refine.solve(build, build(), SolverSettings(num_solutions=2, alpha=0.75))
    assert len(set(zip(found.deployed[0], found.levels[0]))) == len(found.deployed[0]) and len(others) == 1
    assert best.proven and found.problem.option_that_holds(0, best.chosen) is not None
    record = plan_record(library(), found, [best], [], {"solver": "mip", "seconds": 0.1})
    assert record["optimality"]["deployments_and_batches_tried"] == [len(set(found.deployed[0]))]
    (row,) = record["predicted"]
    assert row["requests_over_parent"] == pytest.approx(row["speedup"] / row["answer_length"])
    assert row["requests_over_parent"] >= 1.05 * (1 - 1e-6)
    write_table(tmp_path / "search.md", record)
    assert f"so {row['requests_over_parent']:.3f} times its requests a second" in (tmp_path / "search.md").read_text()
    assert results(record)["answer_length/0"] == AnswerLengths(changes).ratio(best.chosen)


def test_a_plan_that_misses_its_requests_is_caught():
    changes = drawn(2)
    search = program(1.05, changes)
    (found,) = mip.solve(search.problem)
    longer = replace(search, lengths=(AnswerLengths([[0.3] * len(row) for row in LAYERS]),))
    with pytest.raises(DisagreementError, match="requests_over_parent on"):
        check_totals(longer, found)


def test_a_parent_that_does_not_fit_has_no_requests():
    with pytest.raises(ValueError, match=r"requests_over_parent: 1.1 on .* the parent does not fit"):
        program(1.1, None, scenario=replace(FIXED, expert_dtype="float32", batch_size=4096))


def scores(**changes):
    """Return scores where each half of layer l makes answers l + 1 tokens longer at low effort, twice that at high."""
    entries = {}
    for layer, row in enumerate(LAYERS):
        for half in {half for candidate in row for half in parts(candidate) if half is not None}:
            tokens = {"far/tokens/low": layer + 1.0, "far/tokens/high": 2 * (layer + 1.0)}
            entries[layer, half] = {name: Measurement(value) for name, value in tokens.items()}
    own = {"far": 0.5, "far/tokens/low": 10.0, "far/tokens/high": 30.0}
    return replace(Scores("parent", 1, 1, entries, {}, 0, own), **changes)


def read(of, efforts=None, evaluation=None, unmeasured="refuse"):
    return answer_lengths(LAYERS, of, efforts, evaluation, unmeasured).changes


def test_changes_are_relative_to_the_mix():
    first, *others = read(scores())[1]
    assert first == 0.0 and {round(change, 9) for change in others} == {round(c * 6 / 40, 9) for c in (1, 2)}
    assert max(read(scores(), {"low": 1.0})[1]) == pytest.approx(2 * 2 / 10)
    assert max(read(scores(), {"low": 3.0, "high": 1.0}, "far")[1]) == pytest.approx(2 * (3 * 2 + 4) / (3 * 10 + 30))


def test_pairs_are_taken_as_they_were_scored():
    name = LAYERS[1][-1].name
    pair = {(1, name): {"far/tokens/low": Measurement(-5.0), "far/tokens/high": Measurement(1.0)}}
    assert read(scores(entries=dict(scores().entries) | pair))[1][-1] == -4 / 40


def test_what_was_not_measured_is_refused_left_out_or_zero():
    window = next(half for half in parts(LAYERS[1][-1]) if half is not None and "window" in half)
    entries = {key: value for key, value in scores().entries.items() if key != (1, window)}
    with pytest.raises(ValueError, match=rf"layer 1, '{window}' has no 'far/tokens/low'. Score it with"):
        read(scores(entries=entries), unmeasured="exclude")
    untold = scores(entries=entries, could_tell={(1, window): {"far": 0.0}})
    with pytest.raises(ValueError, match="has no 'far/tokens/low'"):
        read(untold)
    assert max(read(untold, unmeasured="exclude")[1]) == float("inf")
    assert max(read(untold, unmeasured="zero")[1]) == pytest.approx(6 / 40)


@pytest.mark.parametrize(
    ("own", "given", "message"),
    [
        ({}, None, r"of one that decodes answers; the scores have those of \[\]"),
        ({"a/tokens/low": 1.0, "b/tokens/low": 1.0}, None, r"those of \['a', 'b'\]. .* constraints.lengths_by"),
        ({"a/tokens/low": 1.0}, "c", r"answer lengths of 'c'; the scores have those of \['a'\]"),
    ],
)
def test_one_evaluation_must_have_measured_lengths(own, given, message):
    with pytest.raises(ValueError, match=message):
        read(scores(parent=own), evaluation=given)


def test_efforts_that_were_not_measured_are_refused():
    with pytest.raises(ValueError, match=r"efforts \['medium'\] were given, but 'far' measured answers at"):
        read(scores(), {"low": 1.0, "medium": 1.0})
