"""The search stage: a block library, its scores and budgets become the least damaging plan that fits them.

Reads the library's folder (`library.json`) and the scores' (`scores.json`). Writes, in `run_dir`:

    plan.json           plan, its damage, predicted costs of parent and child per target, scores, optimality,
                        alternatives, sweep; `lit_puzzle.spec.Plan.load` reads it
    search.md           the same as a table to read
    plan.png, .svg      kept experts and window of every layer
    curve.png, .svg     damage against speed, with `sweep`

What is proven is proven for the deployments and batches tried: a ladder of batches, and finer ones around the chosen.
After the solver the cost model predicts the chosen plan once more; totals that differ from the solver's are an error.
plan.json and search.md are written as soon as the plan is known, and again when the sweep is done.
Neither torch nor lightning is loaded: with cached costs a search is a matter of seconds on any machine.

Memory: 8 bytes x candidates x limits of all options (at 120B: 432 x 200 numbers, below 1 MB). Disk: plan.json, about 6
bytes per kept expert of each plan. Time: one linear program per option (deployment x batch of a target), then few
programs in whole numbers.

Source: arXiv 2411.19146 (mixed-integer program over blocks), arXiv 2602.11937 (targets in two scenarios).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lit_puzzle.costs.cost_model import CostModel, KernelTimes, ModelShape, ServingEngine
from lit_puzzle.library.library import Library
from lit_puzzle.run.folder import require_input, write_atomically
from lit_puzzle.scoring.scores import Scores
from lit_puzzle.search.objective import Objective
from lit_puzzle.search.plan_record import headline, plan_record
from lit_puzzle.search.program import SearchProgram, Windows, offered, write_program
from lit_puzzle.search.refine import Rounds, WriteProgram, faster
from lit_puzzle.search.report import draw_curve, draw_plan, write_table
from lit_puzzle.search.solver.batches import Pairs
from lit_puzzle.search.solver.choices import Settings, Solution
from lit_puzzle.spec import Budget, Target

SolverName = Literal["mip", "greedy", "uniform", "random", "max_parameters"]


def search(
    run_dir: Path,
    library: Path,
    scores: Path,
    targets: list[Target],
    times: KernelTimes,
    limits: Budget = Budget(),  # noqa: B008  (frozen)
    objective: Objective = Objective(),  # noqa: B008
    engine: ServingEngine = ServingEngine(),  # noqa: B008
    solver: SolverName = "mip",
    uniform_experts: bool = False,
    windows: Windows = "free",
    batch_sizes: list[int] | None = None,
    num_solutions: int = 1,
    alpha: float = 0.8,
    time_limit_seconds: float = 60.0,
    sweep_time_limit_seconds: float = 180.0,
    relative_gap: float = 0.0,
    sweep: list[float] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Find the plan with the least damage that meets every target.

    Args:
        run_dir: Run folder of this stage.
        library: Folder with library.json.
        scores: Folder with scores.json, or such a file.
        targets: Deployments and what the child must reach in each; all of them hold at once.
        times: Where seconds come from: `lit_puzzle.costs.roofline.Roofline`, `MeasuredKernels`, `TimedBlocks`.
        limits: Bounds that no deployment changes: total_parameters, active_parameters, full_attention_layers.
        objective: How scores become the damage of a candidate.
        engine: Settings of the serving engine.
        solver: mip is exact and proves it; the others are baselines.
        uniform_experts: The same number of experts in every layer, so that any runtime loads the child.
        windows: unchanged leaves every layer the parent's attention.
        batch_sizes: Batches to try where a scenario names none; null takes up to 12 per deployment.
        num_solutions: Plans wanted; the first is the best, the others are in plan.json as alternatives.
        alpha: A later plan shares at most this part of its layers with each earlier one.
        time_limit_seconds: For the best plan; what is found by then is written with the gap that is left. All
            alternatives together get as much again.
        sweep_time_limit_seconds: For all points of the sweep together.
        relative_gap: Part of the damage that may be left unproven.
        sweep: Values of the first target's throughput_over_parent to draw the damage for, once the plan is written.
        seed: For solver: random.

    Returns:
        Damage, bound, gap and proof (1 or 0), and the child's parameters, memory, throughput and speed-up per target.

    Raises:
        ValueError: For input that is missing, of two parents, incomplete or not a number.
        Infeasible: No plan meets the targets; names the tightest budget and the cheapest plan for it.
        DisagreementError: The solver's totals are not those of the cost model.
    """
    rounds = Rounds(
        solver, Settings(num_solutions, alpha, time_limit_seconds, relative_gap, seed), refine=batch_sizes is None
    )
    if not sweep_time_limit_seconds > 0:
        raise ValueError(f"sweep_time_limit_seconds must be positive, got {sweep_time_limit_seconds}")
    swept = [(value, _swept(targets, value)) for value in sweep or ()]
    sources = Sources.load(library, scores, targets, times, engine, objective, windows)
    write = partial(sources.write, limits=limits, uniform_experts=uniform_experts, batch_sizes=batch_sizes)
    first = write(targets)
    if swept and first.parents[0] is None:
        raise ValueError("sweep: counts in multiples of the parent's throughput, but the parent does not fit there")
    _say_what_is_costed(targets, sources.library.config)
    program, solutions, seconds = _solve(rounds, partial(write, targets), first)
    record = plan_record(sources.library, program, solutions, [], {"solver": solver, "seconds": round(seconds, 3)})
    record["library"] = str(library)
    _save(run_dir, record)
    draw_plan(run_dir, sources.library, record["plan"])
    if swept:
        points = rounds.sweep([(value, partial(write, wanted)) for value, wanted in swept], sweep_time_limit_seconds)
        record["sweep"] = [dataclasses.asdict(point) for point in points]
        _save(run_dir, record)
        draw_curve(run_dir, points)
    return headline(record)


def _save(run_dir: Path, record: dict[str, Any]) -> None:
    write_atomically(run_dir / "plan.json", json.dumps(record, indent=1) + "\n")
    write_table(run_dir / "search.md", record)


def _swept(targets: Sequence[Target], value: float) -> list[Target]:
    try:
        return faster(targets, value)
    except ValueError as error:
        raise ValueError(f"sweep: {error}") from error


def _say_what_is_costed(targets: Sequence[Target], config: Mapping[str, Any]) -> None:
    """One line when a scenario's experts are stored otherwise than the parent's: a what-if, or an oversight."""
    stored = stored_expert_dtype(config)
    other = [f"{n}: {t.scenario.expert_dtype}" for n, t in enumerate(targets, 1) if t.scenario.expert_dtype != stored]
    if stored is not None and other:
        print(
            f"warning: the parent stores its experts as {stored}, but expert_dtype of target {', '.join(other)}; costs "
            f"are counted so. Set expert_dtype: {stored} unless the child will be converted.",
            flush=True,
        )


def stored_expert_dtype(config: Mapping[str, Any]) -> str | None:
    """Number format of the experts in a checkpoint with this config.json; None when it does not say."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        return str(method)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return None if dtype is None else str(dtype)


@dataclass(frozen=True)
class Sources:
    """What the stage has read, checked against each other."""

    library: Library
    layers: tuple[Any, ...]
    quality_losses: tuple[tuple[float, ...], ...]
    models: tuple[CostModel, ...]

    @classmethod
    def load(
        cls,
        library_path: Path,
        scores_path: Path,
        targets: Sequence[Target],
        times: KernelTimes,
        engine: ServingEngine,
        rule: Objective,
        windows: Windows,
    ) -> Sources:
        """Read library and scores and make the cost models."""
        library = Library.load(require_input(library_path, "block library"))
        scores = Scores.load(require_input(scores_path, "scores of the blocks"))
        scores.check_library(library)
        layers = offered(library, windows)
        searched = dataclasses.replace(library, layers=layers)
        quality_losses = tuple(tuple(row) for row in rule.quality_losses(searched, scores))
        shape = ModelShape.from_config(library.config)
        models = tuple(CostModel(shape, target.scenario, times, engine) for target in targets)
        return cls(library, layers, quality_losses, models)

    def write(
        self,
        targets: Sequence[Target],
        limits: Budget,
        uniform_experts: bool,
        batch_sizes: Sequence[int] | None,
        tried: Sequence[Pairs] | None = None,
    ) -> SearchProgram:
        """The problem with these targets."""
        return write_program(
            self.layers, self.quality_losses, targets, self.models, limits, uniform_experts, batch_sizes, tried
        )


def _solve(rounds: Rounds, write: WriteProgram, program: SearchProgram) -> tuple[SearchProgram, list[Solution], float]:
    candidates = sum(len(row) for row in program.layers)
    print(
        f"solver {rounds.solver}: {len(program.layers)} layers, {candidates} candidates, {len(program.targets)} "
        f"target(s) with {_tried(program, ' x ')} deployments and batches",
        flush=True,
    )
    start = time.monotonic()
    program, solutions = rounds.solve(write, program)
    seconds, best = time.monotonic() - start, solutions[0]
    where = f"for the {_tried(program, ' and ')} deployments and batches tried"
    if best.gap is None:
        proof = "nothing proven"
    elif best.gap == 0:
        proof = f"proven optimal {where}"
    else:
        proof = f"gap {best.gap:.2%}, bound {best.bound:.6g} {where}"
    print(
        f"solver {rounds.solver}: quality loss {best.quality_loss:.6g}, {proof}, {len(solutions)} plan(s), "
        f"{seconds:.2f} s",
        flush=True,
    )
    return program, solutions, seconds


def _tried(program: SearchProgram, between: str) -> str:
    return between.join(str(len(pairs)) for pairs in program.deployed)
