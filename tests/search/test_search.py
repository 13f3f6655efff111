"""search.py: from the tiny parent to an assembled child, the paper's targets at 120B shape, and bad input."""

import importlib.util
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lit_puzzle.child.assemble import assemble
from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.engine import ServingEngine
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.roofline import Roofline
from lit_puzzle.costs.serving import Block
from lit_puzzle.library.library import Candidate, Library, candidate_name, parent_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.scoring.scores import Measurement, Scores
from lit_puzzle.search.objective import Objective
from lit_puzzle.search.search import search
from lit_puzzle.search.settings import Constraints, Costs, SearchSpace
from lit_puzzle.search.solver.choices import DisagreementError, InfeasibleError
from lit_puzzle.search.solver.settings import SolverSettings
from lit_puzzle.spec import BlockSpec, Budget, Plan, Scenario, Target

ROOT = Path(__file__).parents[2]
TINY_PARENT = ROOT / "lit_puzzle" / "assets" / "tiny_parent"
SCENARIO = Scenario("cpu", 1, 96, 32, kv_dtype="bfloat16", expert_dtype="bfloat16")
HALF = Target(SCENARIO, Budget(total_parameters=1_300_000))


def load_bench():
    spec = importlib.util.spec_from_file_location("bench_search", ROOT / "scripts" / "bench" / "search.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Make a library and scores of the tiny parent: 4 to 16 experts; only layer 1 needs its full attention."""
    folder, parent, generator = tmp_path_factory.mktemp("tiny"), Checkpoint(TINY_PARENT), random.Random(0)
    layers, entries = [], {}
    for layer, own in enumerate(parent_blocks(parent.config)):
        windows = (None, 16) if own.window_tokens is None else (own.window_tokens,)
        orders = sorted(range(own.num_experts), key=lambda _: generator.random())
        counts = (16, 12, 8, 4)
        blocks = [BlockSpec(tuple(sorted(orders[:count])), window) for window in windows for count in counts]
        layers.append(tuple(Candidate(candidate_name(own, block), block) for block in blocks))
        for count in counts[1:]:
            entries[layer, f"experts={count}"] = {"kl": Measurement((layer + 1) * (16 - count) ** 2 / 1000, 0.0)}
        if layer % 2:
            entries[layer, "window=16"] = {"kl": Measurement(3.0 if layer == 1 else 0.001, 0.0)}
    fingerprint = parent.fingerprint()
    library, scores = Library(fingerprint, 16, parent.config, tuple(layers)), Scores(fingerprint, 8, 100, entries)
    for name, content in (("library", library), ("scores", scores)):
        (folder / name).mkdir()
        content.save(folder / name)
    return folder


def run(inputs, run_dir, **changes):
    run_dir.mkdir(exist_ok=True)
    arguments = {
        "library": inputs / "library",
        "scores": inputs / "scores",
        "constraints": Constraints([HALF]),
        "costs": Costs(Roofline()),
        **changes,
    }
    return search(run_dir, **arguments)


def read(run_dir):
    return json.loads((run_dir / "plan.json").read_text())


def test_the_plan_is_assembled_into_a_child_of_the_predicted_size(inputs, tmp_path, capsys):
    constraints = Constraints([HALF], Budget(full_attention_layers=1), sweep=[1.05, 1.1, 50.0])
    results = run(inputs, tmp_path, constraints=constraints, solver=SolverSettings(num_solutions=3))
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("solver mip: 6 layers, 36 candidates") and "proven optimal" in last
    record = read(tmp_path)
    plan = Plan.load(tmp_path / "plan.json")
    assert [block.window_tokens for block in plan.blocks] == [16, None, 16, 16, 16, 16]
    assert record["optimality"]["proven"] and record["optimality"]["gap"] == 0
    assert (
        record["quality_loss"]
        == pytest.approx(sum(row["quality_loss"] for row in record["scores"]))
        == results["quality_loss"]
    )
    assert len(record["alternatives"]) == 2
    assert record["alternatives"][0]["quality_loss"] >= record["quality_loss"]
    assert [point["quality_loss"] is None for point in record["sweep"]] == [False, False, True]
    for name in ("plan.png", "plan.svg", "curve.png", "curve.svg", "search.md"):
        assert (tmp_path / name).stat().st_size > 100
    (tmp_path / "child").mkdir()
    assemble(tmp_path / "child", TINY_PARENT, plan=tmp_path / "plan.json")
    child = Checkpoint(tmp_path / "child" / "child")
    parameters = sum(math.prod(info.shape) for info in child.tensors.values())
    assert parameters == record["predicted"][0]["child"]["parameters"] == results["parameters"] <= 1_300_000


def test_every_baseline_stays_within_the_budget_and_is_no_better(inputs, tmp_path):
    best = run(inputs, tmp_path / "mip")
    for solver in ("greedy", "uniform", "random", "max_parameters"):
        results = run(inputs, tmp_path / solver, solver=SolverSettings(name=solver))
        assert results["quality_loss"] >= best["quality_loss"] - 1e-12
        assert results["parameters"] <= 1_300_000 and results["proven"] == 0 and "bound" not in results
        assert "It is not proven to be optimal" in (tmp_path / solver / "search.md").read_text()


def test_a_child_for_stock_runtimes(inputs, tmp_path):
    run(inputs, tmp_path, space=SearchSpace(uniform_experts=True, windows="unchanged"))
    plan = Plan.load(tmp_path / "plan.json")
    assert len({block.num_experts for block in plan.blocks}) == 1
    assert [block.window_tokens for block in plan.blocks] == [16, None] * 3


def test_finer_batch_sizes_never_have_a_higher_quality_loss(inputs, tmp_path):
    fast = Target(replace(SCENARIO, prompt_tokens=200_000), Budget(throughput_over_parent=1.15, memory_gib=1.0))
    coarse = run(inputs, tmp_path / "coarse", constraints=Constraints([fast]), space=SearchSpace(batch_sizes=[1, 2, 4]))
    fine = run(inputs, tmp_path / "fine", constraints=Constraints([fast]))
    assert fine["quality_loss"] <= coarse["quality_loss"] and fine["speedup/0"] >= 1.15 * (1 - 1e-6)
    assert coarse["speedup/0"] >= 1.15 * (1 - 1e-6)


def test_the_papers_targets_at_120b_shape(tmp_path):
    """36 layers, 8 x H100: 64K/64K at 1.6 times and 4K/4K at 1.2 times the parent, with synthetic scores."""
    bench = load_bench()
    library = bench.make_library(padded=False)
    scores = bench.make_scores(library)
    for name, content in (("library", library), ("scores", scores)):
        (tmp_path / name).mkdir()
        content.save(tmp_path / name)
    engine = ServingEngine(max_sequences=256)
    results = run(
        tmp_path,
        tmp_path / "run",
        constraints=Constraints(bench.TARGETS),
        costs=Costs(Roofline(), engine),
        objective=Objective(window_metric="long_context"),
        space=SearchSpace(batch_sizes=bench.BATCH_SIZES),
    )
    assert results["proven"] == 1 and results["gap"] == 0
    record, plan = read(tmp_path / "run"), Plan.load(tmp_path / "run" / "plan.json")
    blocks = [Block(block.num_experts, block.window_tokens) for block in plan.blocks]
    parent = [Block(128, None if layer % 2 else 128) for layer in range(36)]
    for target, over in zip(bench.TARGETS, (1.6, 1.2)):  # from the cost model alone, without the stage
        model = CostModel(ModelShape.from_config(bench.CONFIG), target.scenario, Roofline(), engine)
        child = model.best(blocks)
        assert child.fits and child.tokens_per_second >= over * model.best(parent).tokens_per_second * (1 - 1e-6)
    assert record["predicted"][0]["parent"]["parameters"] == 116_829_156_672


@pytest.mark.slow
def test_measured_kernels_at_120b_shape(tmp_path):
    """The recipe for gpt-oss-120b on synthetic inputs."""
    pytest.importorskip("aiconfigurator_core")
    bench = load_bench()
    library = bench.make_library(padded=False)
    for name, content in (("library", library), ("scores", bench.make_scores(library))):
        (tmp_path / name).mkdir()
        content.save(tmp_path / name)
    done = lightning(
        "recipes/gpt_oss_120b/search.yaml",
        *(f"--{key}={tmp_path / value}" for key, value in {"library": "library", "scores": "scores"}.items()),
        *(
            f"--run_dir={tmp_path / 'run'}",
            "--objective.metric=kl",
            "--solver.num_solutions=1",
            "--constraints.sweep=null",
        ),
        *("--costs.engine.max_sequences=256", "--space.batch_sizes=[64,128,192,256]"),
    )
    assert done.returncode == 0, done.stderr
    record = read(tmp_path / "run")
    assert record["optimality"]["proven"] and record["optimality"]["gap"] == 0
    speedups = [row["speedup"] for row in record["predicted"]]
    assert speedups[0] >= 1.6 * (1 - 1e-6) and speedups[1] >= 1.2 * (1 - 1e-6)


def test_without_a_plan_the_error_shows_what_the_nearest_one_reaches(inputs, tmp_path):
    tiny = Target(SCENARIO, Budget(total_parameters=100_000))
    with pytest.raises(
        InfeasibleError, match=r"'total_parameters on 1 x cpu.*needs [\d,]+, allowed is 100,000 "
    ) as caught:
        run(inputs, tmp_path, constraints=Constraints([tiny]))
    message = str(caught.value)
    assert "that plan reaches:\n- 1 x cpu at 96 + 32 tokens:" in message and "x the parent" in message
    assert "'experts=4'" in message and not (tmp_path / "plan.json").exists()


def test_budgets_that_contradict_each_other_are_named(inputs, tmp_path):
    fast, small = Budget(latency_seconds=1e-9), Budget(total_parameters=1_000_000)
    with pytest.raises(InfeasibleError, match="tightest budget is 'latency_seconds on target 1: 1 x cpu"):
        run(inputs, tmp_path, constraints=Constraints([Target(SCENARIO, fast), Target(SCENARIO, small)]))


def test_scores_that_are_missing_are_named(inputs, tmp_path):
    scores = Scores.load(inputs / "scores")
    replace(scores, entries={k: v for k, v in scores.entries.items() if k != (3, "experts=8")}).save(tmp_path)
    with pytest.raises(ValueError, match="layer 3, candidate 'experts=8'"):
        run(inputs, tmp_path / "run", scores=tmp_path)


def test_scores_that_are_not_finite_are_neither_written_nor_read(inputs, tmp_path):
    scores = Scores.load(inputs / "scores")
    broken = replace(scores, entries={**scores.entries, (2, "experts=4"): {"kl": Measurement(math.nan, 0.0)}})
    with pytest.raises(ValueError, match=r"scores\.json: entries\.\d+\.metrics\.kl\.mean is nan"):
        broken.save(tmp_path)
    (tmp_path / "scores.json").write_text(json.dumps(broken.to_json()))
    with pytest.raises(ValueError, match=r"scores\.json: NaN is not a JSON number"):
        run(inputs, tmp_path / "run", scores=tmp_path)


def test_other_bad_input(inputs, tmp_path):
    replace(Scores.load(inputs / "scores"), parent_fingerprint="another").save(tmp_path)
    with pytest.raises(ValueError, match="parent another"):
        run(inputs, tmp_path / "run", scores=tmp_path)
    unknown = Target(replace(SCENARIO, gpu="H1000"), Budget())
    with pytest.raises(ValueError, match="unknown GPU 'H1000'"):
        run(inputs, tmp_path / "run", constraints=Constraints([unknown]))
    with pytest.raises(ValueError, match=r"block library .* does not exist"):
        run(inputs, tmp_path / "run", library=tmp_path / "nowhere")
    assert not list((tmp_path / "run").iterdir())


def test_totals_that_differ_from_the_cost_model_are_an_error(inputs, tmp_path, monkeypatch):
    config, honest = Checkpoint(TINY_PARENT).config, CostModel.predict
    model = CostModel(ModelShape.from_config(config), SCENARIO, Roofline())
    speed = model.best([Block(block.num_experts, block.window_tokens) for block in parent_blocks(config)])

    def slower(model, *arguments):
        predicted = honest(model, *arguments)
        return replace(predicted, tokens_per_second=predicted.tokens_per_second * 0.9)

    monkeypatch.setattr(CostModel, "predict", slower)
    fast = Target(SCENARIO, Budget(throughput_tokens_per_second=speed.tokens_per_second))
    with pytest.raises(DisagreementError, match=r"throughput_tokens_per_second on 1 x cpu.*: the solver counted"):
        run(inputs, tmp_path, constraints=Constraints([fast]))


RECIPE = """command: lit_puzzle.search.search.search
run_dir: {folder}/run
library: {inputs}/library
scores: {inputs}/scores
costs: {{times: {{class_path: lit_puzzle.costs.roofline.Roofline}}}}
constraints:
  targets:
  - scenario: {{gpu: cpu, num_gpus: 1, prompt_tokens: 96, generated_tokens: 32, expert_dtype: bfloat16}}
    budget: {{total_parameters: {parameters}}}
"""


def lightning(recipe, *words):
    code = "import sys; from lit_puzzle.cli import main; main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, "run", recipe, *words], capture_output=True, text=True)


@pytest.mark.slow
def test_lightning_run(inputs, tmp_path):
    recipe = tmp_path / "search.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path, inputs=inputs, parameters=1_300_000))
    done = lightning(str(recipe), "--constraints.limits.full_attention_layers=2")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["results"]["proven"] == 1
    assert sum(block.window_tokens is None for block in Plan.load(tmp_path / "run" / "plan.json").blocks) <= 2
    recipe.write_text(RECIPE.format(folder=tmp_path, inputs=inputs, parameters=1000).replace("/run\n", "/other\n"))
    refused = lightning(str(recipe))
    assert refused.returncode == 2 and refused.stderr.startswith("error: No plan: the tightest budget is")
    assert not (tmp_path / "other").exists()
    zero = lightning(str(recipe), "--constraints.limits.total_parameters=0")
    assert zero.returncode == 2 and "total_parameters must be positive" in zero.stderr
