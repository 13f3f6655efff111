"""What a search keeps when its time is up, which alternatives it gives, and what it says of a what-if."""

import itertools
import json
from dataclasses import replace

import pytest
from test_program import CONFIG, LAYERS, SCENARIO

from lit_puzzle.costs.cost_model import CostModel, ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.library.library import Library, parts
from lit_puzzle.scoring.scores import Measurement, Scores
from lit_puzzle.search import refine as refine_module
from lit_puzzle.search import report as search_report
from lit_puzzle.search.program import write_program
from lit_puzzle.search.refine import Rounds
from lit_puzzle.search.search import search, stored_expert_dtype
from lit_puzzle.search.solver import mip
from lit_puzzle.search.solver.choices import OutOfTimeError, Settings
from lit_puzzle.spec import Budget, Target

FAST = Target(replace(SCENARIO, prompt_tokens=200_000), Budget(throughput_over_parent=1.5))


def quality_losses():
    return [[0.1 * (layer + 1) * index**1.5 for index in range(len(row))] for layer, row in enumerate(LAYERS)]


def writer(target=FAST):
    model = CostModel(ModelShape.from_config(CONFIG), target.scenario, Roofline())

    def write(tried=None):
        return write_program(LAYERS, quality_losses(), [target], [model], Budget(), tried=tried)

    return write


def test_alternatives_are_the_best_of_everything_tried():
    write = writer()
    coarse = write()
    program, solutions = Rounds("mip", Settings(num_solutions=4, alpha=0.5), refine=True).solve(write, coarse)
    assert set(coarse.deployed[0]) < set(program.deployed[0])  # finer ones came to those of the ladder
    plans = [p for p in itertools.product(*map(range, map(len, LAYERS))) if program.problem.options_that_hold(p)]
    for position, solution in enumerate(solutions):
        earlier = [other.chosen for other in solutions[:position]]
        unlike = [p for p in plans if all(sum(a == b for a, b in zip(p, other)) <= 2 for other in earlier)]
        assert solution.quality_loss == pytest.approx(min(map(program.problem.total_quality_loss, unlike)))
        assert solution.proven
    assert len(solutions) == 4


def no_time_for(monkeypatch, wanted):
    """The exact solver runs out of time where `wanted(settings)` says so, with settings as it got them in `seen`."""
    honest, seen = mip.solve, []

    def impatient(problem, settings):
        seen.append(settings)
        if wanted(settings):
            raise OutOfTimeError("No plan was found in time")
        return honest(problem, settings)

    monkeypatch.setitem(refine_module.SOLVERS, "mip", impatient)
    return seen


def test_alternatives_have_a_time_of_their_own_and_cost_the_first_plan_nothing(monkeypatch, capsys):
    rounds, write = Rounds("mip", Settings(num_solutions=3, time_limit_seconds=50.0), refine=True), writer()
    _, (alone, *_) = rounds.solve(write, write())
    seen = no_time_for(monkeypatch, lambda settings: settings.unlike)
    _, solutions = rounds.solve(write, write())
    assert solutions == [alone] and alone.proven
    assert {settings.num_solutions for settings in seen if not settings.unlike} == {1}
    (later,) = (settings for settings in seen if settings.unlike)
    assert later.num_solutions == 2 and later.time_limit_seconds == 50.0
    assert "no alternative was found in 50 s" in capsys.readouterr().out


def test_no_time_for_finer_batches_leaves_the_proof(monkeypatch):
    write = writer()
    no_time_for(monkeypatch, lambda settings: settings.known is not None)
    program, (solution,) = Rounds("mip", Settings(), refine=True).solve(write, write())
    assert solution.proven and solution == mip.solve(program.problem)[0]


def test_another_error_of_a_finer_search_is_not_swallowed():
    write = writer()

    def broken(tried=None):
        if tried is not None:
            raise ValueError("timed up to batch 8; set engine.max_sequences")
        return write()

    with pytest.raises(ValueError, match="timed up to batch 8"):
        Rounds("mip", Settings(), refine=True).solve(broken, write())


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


def run(inputs, run_dir, **changes):
    run_dir.mkdir(exist_ok=True)
    targets = changes.pop("targets", [FAST])
    return search(
        run_dir, inputs / "library", inputs / "scores", targets, Roofline(), batch_sizes=[4, 32, 100], **changes
    )


def test_a_sweep_without_time_leaves_the_proven_plan(inputs, tmp_path, monkeypatch):
    once = iter([False])
    no_time_for(monkeypatch, lambda settings: next(once, True))
    results = run(inputs, tmp_path, sweep=[1.1, 1.2])
    record = json.loads((tmp_path / "plan.json").read_text())
    assert results["proven"] == 1 and record["optimality"]["proven"]
    assert record["sweep"] == [
        {"throughput_over_parent": value, "quality_loss": None, "proven": False} for value in (1.1, 1.2)
    ]


def test_the_plan_is_on_disk_before_the_sweep_starts(inputs, tmp_path, monkeypatch):
    def interrupted(rounds, writers, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(Rounds, "sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(inputs, tmp_path, sweep=[1.1])
    assert json.loads((tmp_path / "plan.json").read_text())["sweep"] == []
    assert "proven for the 6 deployments and batches tried" in (tmp_path / "search.md").read_text()


def test_a_sweep_has_one_time_limit_in_all(monkeypatch):
    seen = no_time_for(monkeypatch, lambda settings: True)
    Rounds("mip", Settings(), refine=False).sweep([(1.0, writer())] * 3, 6.0)
    limits = [settings.time_limit_seconds for settings in seen]
    assert limits[0] <= 2.0 and len(limits) == 3 and limits[-1] <= 6.0


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_sweep_of_what_is_no_speed_is_refused_first(inputs, tmp_path, value):
    with pytest.raises(ValueError, match="sweep_time_limit_seconds must be positive"):
        run(inputs, tmp_path, sweep=[1.1], sweep_time_limit_seconds=0.0)
    with pytest.raises(ValueError, match="sweep: Budget: throughput_over_parent must be"):
        run(inputs, tmp_path, sweep=[1.1, value])
    assert not list(tmp_path.iterdir())


def test_experts_costed_otherwise_than_stored_are_told(inputs, tmp_path, capsys):
    run(inputs, tmp_path)
    warning, *_ = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: the parent stores its experts as bfloat16, but expert_dtype of target 1: mxfp4")
    same = Target(replace(FAST.scenario, expert_dtype="bfloat16"), FAST.budget)
    run(inputs, tmp_path, targets=[same])
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
    assert "proven optimal for the 6 deployments and batches tried" in last
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["optimality"]["deployments_and_batches_tried"] == [6]
    assert search_report._proof(record).endswith("no plan within these budgets does less there.")
