"""The search stage: from a block library, its scores and budgets to the plan with the lowest quality loss within them.

Reads the library's folder (`library.json`) and the scores' (`scores.json`). Writes, in `run_dir`:

    plan.json           plan, its quality loss, predicted costs of parent and child per target, scores, optimality,
                        alternatives, sweep; `lit_puzzle.spec.Plan.load` reads it
    search.md           the same as a table to read
    plan.png, .svg      kept experts and window of every layer
    curve.png, .svg     quality loss against speed, with `constraints.sweep`

    minimize    sum over layers of the quality loss of the chosen candidate      (`lit_puzzle.search.objective`)
    subject to  every budget, as a limit on a sum over layers                    (`lit_puzzle.search.limits`)

The optimum is proven for the deployments and batch sizes tried: a ladder of batch sizes, then finer ones around the
chosen ones. After the solver the cost model predicts the chosen plan once more; totals that differ from the solver's
are an error. plan.json and search.md are written as soon as the plan is known, and again when the sweep is done.
Neither torch nor lightning is imported.

Memory: 8 bytes x candidates x limits of all options (at 120B: 432 x 200 numbers, below 1 MB). Disk: plan.json, about 6
bytes per kept expert of each plan. Time: one linear program per option (deployment x batch size of a target), then a
few mixed-integer programs.

Source: arXiv 2411.19146 (mixed-integer program over blocks), arXiv 2602.11937 (targets in two scenarios).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.timed_blocks import TimedBlocks
from lit_puzzle.library.library import LIBRARY_FILE, Library
from lit_puzzle.run.files import write_json
from lit_puzzle.run.folder import require_input
from lit_puzzle.run.identity import Identity, file_identity
from lit_puzzle.run.inputs import claim_inputs, record_output
from lit_puzzle.run.lineage import check_made_with
from lit_puzzle.scoring.scores import SCORES_FILE, Scores
from lit_puzzle.search import refine
from lit_puzzle.search.answer_lengths import AnswerLengths, answer_lengths
from lit_puzzle.search.batches import DeployedBatch
from lit_puzzle.search.edges import edges
from lit_puzzle.search.limits import Layers
from lit_puzzle.search.objective import Objective
from lit_puzzle.search.plan_record import plan_record, results
from lit_puzzle.search.program import SearchProgram, build_program, offered
from lit_puzzle.search.report import draw_curve, draw_plan, write_table
from lit_puzzle.search.settings import Constraints, Costs, SearchSpace
from lit_puzzle.search.solver.choices import Solution
from lit_puzzle.search.solver.settings import SolverSettings
from lit_puzzle.spec import Target

PLAN_FILE = "plan.json"


def search(
    run_dir: Path,
    library: Path,
    scores: Path,
    constraints: Constraints,
    costs: Costs,
    objective: Objective = Objective(),  # noqa: B008  (frozen)
    space: SearchSpace = SearchSpace(),  # noqa: B008
    solver: SolverSettings = SolverSettings(),  # noqa: B008
) -> dict[str, float]:
    """Find the plan with the lowest quality loss that meets every target.

    Args:
        run_dir: run folder of this stage.
        library: folder with library.json.
        scores: folder with scores.json, or such a file.
        constraints: what the child must reach: targets, limits, and a sweep of the first target's throughput.
        costs: how serving costs are predicted: source of kernel times and settings of the engine.
        objective: how scores become the quality loss of a candidate.
        space: what may be chosen: windows, expert counts, batch sizes.
        solver: which solver, how many plans, time limits, gap and seed.

    Returns:
        Quality loss, bound, gap and proof (1 or 0), and the child's parameters, memory, throughput and speed-up per
        target.

    Raises:
        ValueError: an input is missing, incomplete or not finite, or inputs are of two parents.
        InfeasibleError: no plan meets the targets; the message names the tightest budget and its cheapest plan.
        DisagreementError: the solver's totals differ from those of the cost model.
    """
    settings = dataclasses.replace(solver, refine=solver.refine and space.batch_sizes is None)
    inputs = Inputs.load(library, scores, constraints, costs, objective, space)
    claim_inputs(run_dir, _identities(library, scores, costs))
    first = inputs.build(constraints)
    swept = [(value, constraints.with_throughput(value)) for value in constraints.sweep or ()]
    if swept and first.parents[0] is None:
        raise ValueError("sweep is relative to the parent's throughput, but the parent does not fit the first target")
    _warn_about_expert_dtype(constraints.targets, inputs.library.config)
    program, solutions, seconds = _solve(partial(inputs.build, constraints), first, settings)
    record = plan_record(inputs.library, program, solutions, [], {"solver": solver.name, "seconds": round(seconds, 3)})
    record["library"] = str(library)
    record["limits_of_evidence"] = edges(inputs.scores, inputs.library, record["plan"], constraints.targets)
    for words in record["limits_of_evidence"]:
        print(f"note: {words}", flush=True)
    _save(run_dir, record)
    draw_plan(run_dir, inputs.library, record["plan"])
    if swept:
        points = refine.sweep([(value, partial(inputs.build, faster)) for value, faster in swept], settings)
        record["sweep"] = [dataclasses.asdict(point) for point in points]
        _save(run_dir, record)
        draw_curve(run_dir, points)
    record_output(run_dir, "plan", file_identity(run_dir / PLAN_FILE))
    return results(record)


def _identities(library: Path, scores: Path, costs: Costs) -> dict[str, Identity]:
    library = require_input(library, "block library", LIBRARY_FILE)
    scores = require_input(scores, "scores of the blocks", SCORES_FILE)
    found = {"library": Library.load(library).identity(library)}
    check_made_with(scores, "library", found["library"], "Score this very library with recipes/score.yaml.")
    found["scores"] = file_identity(scores / SCORES_FILE if scores.is_dir() else scores)
    if isinstance(costs.times, TimedBlocks):
        found["costs.times.table"] = file_identity(costs.times.table)
    return found


def _save(run_dir: Path, record: dict[str, Any]) -> None:
    write_json(run_dir / PLAN_FILE, record)
    write_table(run_dir / "search.md", record)


def _warn_about_expert_dtype(targets: Sequence[Target], config: Mapping[str, Any]) -> None:
    """Print a warning when a scenario stores experts in another number format than the parent."""
    stored = stored_expert_dtype(config)
    other = [f"{n}: {t.scenario.expert_dtype}" for n, t in enumerate(targets, 1) if t.scenario.expert_dtype != stored]
    if stored is not None and other:
        print(
            f"warning: the parent stores its experts as {stored}, but costs are predicted for the expert_dtype of "
            f"target {', '.join(other)}. Set expert_dtype: {stored} unless the child will be converted.",
            flush=True,
        )


def stored_expert_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the number format of the experts in a checkpoint with this config.json; None where it is not given."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        return str(method)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return None if dtype is None else str(dtype)


@dataclass(frozen=True)
class Inputs:
    """The inputs of the stage, checked against each other.

    Attributes:
        library: the block library.
        layers: the candidates that may be chosen.
        quality_losses: the quality loss of each.
        models: one cost model per target.
        space: what may be chosen.
        scores: the scores.
        lengths: changes of answer lengths per target; None where requests are not bounded.
    """

    library: Library
    layers: Layers
    quality_losses: tuple[tuple[float, ...], ...]
    models: tuple[CostModel, ...]
    space: SearchSpace
    scores: Scores
    lengths: tuple[AnswerLengths | None, ...]

    @classmethod
    def load(
        cls,
        library_path: Path,
        scores_path: Path,
        constraints: Constraints,
        costs: Costs,
        objective: Objective,
        space: SearchSpace,
    ) -> Inputs:
        """Read library and scores and make the cost models."""
        library = Library.load(require_input(library_path, "block library", LIBRARY_FILE))
        scores = Scores.load(require_input(scores_path, "scores of the blocks", SCORES_FILE))
        scores.check_library(library)
        measured = dataclasses.replace(library, layers=objective.measured(library, scores))
        layers = offered(objective.best_sets(measured, scores), space.windows)
        searched = dataclasses.replace(library, layers=layers)
        quality_losses = tuple(tuple(row) for row in objective.quality_losses(searched, scores))
        shape = ModelShape.from_config(library.config)
        models = tuple(CostModel(shape, t.scenario, costs.times, costs.engine) for t in constraints.targets)
        lengths = tuple(
            None
            if target.budget.requests_over_parent is None
            else answer_lengths(layers, scores, target.efforts, constraints.lengths_by, objective.unmeasured)
            for target in constraints.targets
        )
        return cls(library, layers, quality_losses, models, space, scores, lengths)

    def build(self, constraints: Constraints, tried: Sequence[Sequence[DeployedBatch]] | None = None) -> SearchProgram:
        """Build the program with these constraints; `tried` are its deployments and batch sizes when given."""
        inputs = self.layers, self.quality_losses, self.models
        return build_program(*inputs, constraints, self.space, tried, self.lengths)


def _solve(
    build: refine.ProgramBuilder, program: SearchProgram, settings: SolverSettings
) -> tuple[SearchProgram, list[Solution], float]:
    """Solve, print one line before and one after, and return the seconds that it took."""
    candidates = sum(len(row) for row in program.layers)
    print(
        f"solver {settings.name}: {len(program.layers)} layers, {candidates} candidates, "
        f"{len(program.constraints.targets)} target(s), deployments and batch sizes to try: {_tried(program, ' x ')}",
        flush=True,
    )
    start = time.monotonic()
    program, solutions = refine.solve(build, program, settings)
    seconds, best = time.monotonic() - start, solutions[0]
    where = f"for all deployments and batch sizes tried ({_tried(program, ' and ')})"
    if best.gap is None:
        proof = "not proven to be optimal"
    elif best.gap == 0:
        proof = f"proven optimal {where}"
    else:
        proof = f"lower bound {best.bound:.6g} {where}, gap {best.gap:.2%}"
    print(
        f"solver {settings.name}: quality loss {best.quality_loss:.6g}, {proof}, {len(solutions)} plan(s), "
        f"{seconds:.2f} s",
        flush=True,
    )
    return program, solutions, seconds


def _tried(program: SearchProgram, between: str) -> str:
    return between.join(map(str, program.num_tried))
