"""refine.py: plans and proofs when the time is up, alternatives, sweeps; and the warnings of the stage."""

import itertools
import json
from dataclasses import replace

import pytest
from helpers.four_layer_programs import CONFIG, LAYERS, SCENARIO

from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.library.library import Library, parts
from lit_puzzle.scoring.scores import Measurement, Scores
from lit_puzzle.search import refine, report
from lit_puzzle.search.program import build_program
from lit_puzzle.search.search import search, stored_expert_dtype
from lit_puzzle.search.settings import Constraints, Costs, SearchSpace
from lit_puzzle.search.solver import mip, solvers
from lit_puzzle.search.solver.choices import OutOfTimeError
from lit_puzzle.search.solver.settings import SolverSettings
from lit_puzzle.spec import Budget, Target

FAST = Target(replace(SCENARIO, prompt_tokens=200_000), Budget(throughput_over_parent=1.5))


def quality_losses():
    return [[0.1 * (layer + 1) * index**1.5 for index in range(len(row))] for layer, row in enumerate(LAYERS)]


def builder(target=FAST):
    model = CostModel(ModelShape.from_config(CONFIG), target.scenario, Roofline())

    def build(tried=None):
        return build_program(LAYERS, quality_losses(), [model], Constraints([target]), SearchSpace(), tried)

    return build


def test_alternatives_are_the_best_of_everything_tried():
    build = builder()
    coarse = build()
    program, solutions = refine.solve(build, coarse, SolverSettings(num_solutions=4, alpha=0.5))
    assert set(coarse.deployed[0]) < set(program.deployed[0])  # finer ones were added to those of the ladder
    plans = [p for p in itertools.product(*map(range, map(len, LAYERS))) if program.problem.options_that_hold(p)]
    for position, solution in enumerate(solutions):
        earlier = [other.chosen for other in solutions[:position]]
        unlike = [p for p in plans if all(sum(a == b for a, b in zip(p, other)) <= 2 for other in earlier)]
        assert solution.quality_loss == pytest.approx(min(map(program.problem.total_quality_loss, unlike)))
        assert solution.proven
    assert len(solutions) == 4


def no_time_for(monkeypatch, wanted):
    """Make the exact solver run out of time where `wanted(earlier)` is true; return what it is called with."""
    honest, seen = mip.solve, []

    def impatient(problem, settings, earlier):
        seen.append((settings, earlier))
        if wanted(earlier):
            raise OutOfTimeError("No plan was found in time")
        return honest(problem, settings, earlier)

    monkeypatch.setitem(solvers.EXACT, "mip", impatient)
    return seen


def test_alternatives_have_a_time_of_their_own_and_cost_the_first_plan_nothing(monkeypatch, capsys):
    settings, build = SolverSettings(num_solutions=3, time_limit_seconds=50.0), builder()
    _, (alone, *_) = refine.solve(build, build(), settings)
    seen = no_time_for(monkeypatch, lambda earlier: earlier.unlike)
    _, solutions = refine.solve(build, build(), settings)
    assert solutions == [alone] and alone.proven
    assert {used.num_solutions for used, earlier in seen if not earlier.unlike} == {1}
    (later,) = (used for used, earlier in seen if earlier.unlike)
    assert later.num_solutions == 2 and later.time_limit_seconds == 50.0
    assert "no alternative was found in 50 s" in capsys.readouterr().out


def test_no_time_for_finer_batches_leaves_the_proof(monkeypatch):
    build = builder()
    no_time_for(monkeypatch, lambda earlier: earlier.start is not None)
    program, (solution,) = refine.solve(build, build(), SolverSettings())
    assert solution.proven and solution == mip.solve(program.problem)[0]


def test_another_error_of_a_finer_search_is_raised():
    build = builder()

    def broken(tried=None):
        if tried is not None:
            raise ValueError("timed up to batch 8; set engine.max_sequences")
        return build()

    with pytest.raises(ValueError, match="timed up to batch 8"):
        refine.solve(broken, build(), SolverSettings())


def test_without_refinement_the_ladder_is_all_that_is_tried():
    build = builder()
    program, _ = refine.solve(build, build(), SolverSettings(refine=False))
    assert program.deployed == build().deployed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    entries = {}
    for layer, (row, values) in enumerate(zip(LAYERS, quality_losses())):
        for candidate, value in zip(row, values):
            for name, quality_loss in zip(parts(candidate), (value, 0.01), strict=True):
                if name is not None:
                    entries[layer, name] = {"kl": Measurement(quality_loss, 0.0)}
    for name, content in (
        ("library", Library("parent", 128, CONFIG | {"dtype": "bfloat16"}, LAYERS)),
        ("scores", Scores("parent", 8, 100, entries)),
    ):
        (folder / name).mkdir()
        content.save(folder / name)
    return folder


def run(inputs, run_dir, target=FAST, sweep=None):
    run_dir.mkdir(exist_ok=True)
    constraints, space = Constraints([target], sweep=sweep), SearchSpace(batch_sizes=[4, 32, 100])
    return search(run_dir, inputs / "library", inputs / "scores", constraints, Costs(Roofline()), space=space)


def test_a_sweep_without_time_leaves_the_proven_plan(inputs, tmp_path, monkeypatch):
    once = iter([False])
    no_time_for(monkeypatch, lambda earlier: next(once, True))
    results = run(inputs, tmp_path, sweep=[1.1, 1.2])
    record = json.loads((tmp_path / "plan.json").read_text())
    assert results["proven"] == 1 and record["optimality"]["proven"]
    assert record["sweep"] == [
        {"throughput_over_parent": value, "quality_loss": None, "proven": False} for value in (1.1, 1.2)
    ]


def test_the_plan_is_on_disk_before_the_sweep_starts(inputs, tmp_path, monkeypatch):
    def interrupted(builders, settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(refine, "sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(inputs, tmp_path, sweep=[1.1])
    assert json.loads((tmp_path / "plan.json").read_text())["sweep"] == []
    assert "optimal for all deployments and batch sizes tried (6)" in (tmp_path / "search.md").read_text()


def test_a_sweep_has_one_time_limit_in_all(monkeypatch):
    seen = no_time_for(monkeypatch, lambda earlier: True)
    points = refine.sweep([(1.0, builder())] * 3, SolverSettings(sweep_time_limit_seconds=6.0))
    assert [(point.quality_loss, point.proven) for point in points] == [(None, False)] * 3
    limits = [used.time_limit_seconds for used, _ in seen]
    assert limits[0] <= 2.0 and len(limits) == 3 and limits[-1] <= 6.0


def test_an_expert_dtype_other_than_the_stored_one_is_a_warning(inputs, tmp_path, capsys):
    run(inputs, tmp_path)
    warning, *_ = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: the parent stores its experts as bfloat16, but costs are predicted for")
    assert "target 1: mxfp4." in warning
    run(inputs, tmp_path, Target(replace(FAST.scenario, expert_dtype="bfloat16"), FAST.budget))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}, "mxfp4"),
        ({"quantization_config": None, "torch_dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({}, None),
    ],
)
def test_how_a_checkpoint_stores_its_experts(config, stored):
    assert stored_expert_dtype(config) == stored


def test_the_printed_line_says_what_is_proven(inputs, tmp_path, capsys):
    run(inputs, tmp_path)
    *_, last = capsys.readouterr().out.splitlines()
    assert "proven optimal for all deployments and batch sizes tried (6)" in last
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["optimality"]["deployments_and_batches_tried"] == [6]
    assert report._proof(record).endswith("It is proven to be optimal for all deployments and batch sizes tried (6).")
