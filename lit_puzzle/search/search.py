"""The search stage: a block library, its scores and budgets become the least damaging plan that fits them.

Reads the library's folder (`library.json`) and the scores' (`scores.json`). Writes, in `run_dir`:

    plan.json           plan, its damage, predicted costs of parent and child per target, scores, optimality,
                        alternatives, sweep; `lit_puzzle.spec.Plan.load` reads it
    search.md           the same as a table to read
    plan.png, .svg      kept experts and window of every layer
    curve.png, .svg     damage against speed, with `sweep`

After the solver the cost model predicts the chosen plan once more; totals that differ from the solver's are an error.
Neither torch nor lightning is loaded: with cached costs a search is a matter of seconds on any machine.

Memory: 8 bytes x candidates x limits of all options (at 120B: 432 x 200 numbers, below 1 MB). Disk: plan.json, about 6
bytes per kept expert of each plan. Time: one linear program per option (deployment x batch of a target), then few
programs in whole numbers.

Source: arXiv 2411.19146 (mixed-integer program over blocks), arXiv 2602.11937 (targets in two scenarios).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lit_puzzle.runs import require_input, write_atomically
from lit_puzzle.search.cost import CostModel, Engine, KernelTimes, ModelShape, Prediction
from lit_puzzle.search.damage import DamageRule
from lit_puzzle.search.library import Library
from lit_puzzle.search.plan_record import check_totals, headline, plan_record
from lit_puzzle.search.problem import Search, Windows, describe, offered, write_problem
from lit_puzzle.search.scores import Scores
from lit_puzzle.search.search_report import SweepPoint, draw_curve, draw_plan, write_table
from lit_puzzle.search.solver.baselines import SOLVERS
from lit_puzzle.search.solver.batches import Pairs, finer
from lit_puzzle.search.solver.choices import Infeasible, Settings, Solution
from lit_puzzle.spec import Budget, Target

SolverName = Literal["mip", "greedy", "uniform", "random", "max_parameters"]


def search(
    run_dir: Path,
    library: Path,
    scores: Path,
    targets: list[Target],
    times: KernelTimes,
    limits: Budget = Budget(),  # noqa: B008  (frozen)
    damage: DamageRule = DamageRule(),  # noqa: B008
    engine: Engine = Engine(),  # noqa: B008
    solver: SolverName = "mip",
    uniform_experts: bool = False,
    windows: Windows = "free",
    batch_sizes: list[int] | None = None,
    num_solutions: int = 1,
    alpha: float = 0.8,
    time_limit_seconds: float = 60.0,
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
        times: Where seconds come from: `lit_puzzle.search.costs.roofline.Roofline`, `MeasuredKernels`, `TimedBlocks`.
        limits: Bounds that no deployment changes: total_parameters, active_parameters, full_attention_layers.
        damage: How scores become the damage of a candidate.
        engine: Settings of the serving engine.
        solver: mip is exact and proves it; the others are baselines.
        uniform_experts: The same number of experts in every layer, so that any runtime loads the child.
        windows: unchanged leaves every layer the parent's attention.
        batch_sizes: Batches to try where a scenario names none; null takes up to 12 per deployment.
        num_solutions: Plans wanted; the first is the best, the others are in plan.json as alternatives.
        alpha: A later plan shares at most this part of its layers with each earlier one.
        time_limit_seconds: For the solver; the best plan by then is written with the gap that is left.
        relative_gap: Part of the damage that may be left unproven.
        sweep: Values of the first target's throughput_over_parent to draw the damage for.
        seed: For solver: random.

    Returns:
        Damage, bound, gap and proof (1 or 0), and the child's parameters, memory, throughput and speed-up per target.

    Raises:
        ValueError: For input that is missing, of two parents, incomplete or not a number.
        Infeasible: No plan meets the targets; names the tightest budget and the cheapest plan for it.
        DisagreementError: The solver's totals are not those of the cost model.
    """
    settings = Settings(num_solutions, alpha, time_limit_seconds, relative_gap, seed)
    sources = Sources.load(library, scores, targets, times, engine, damage, windows)
    write = partial(sources.write, limits=limits, uniform_experts=uniform_experts, batch_sizes=batch_sizes)
    refine = batch_sizes is None
    written, solutions, seconds = _solve(partial(write, targets), solver, settings, refine)
    points = [
        _sweep_point(partial(write, _faster(targets, value)), solver, settings, refine, value) for value in sweep or ()
    ]
    record = plan_record(sources.library, written, solutions, points, {"solver": solver, "seconds": round(seconds, 3)})
    write_atomically(run_dir / "plan.json", json.dumps(record, indent=1) + "\n")
    write_table(run_dir / "search.md", record)
    draw_plan(run_dir, sources.library, record["plan"])
    if points:
        draw_curve(run_dir, points)
    return headline(record)


@dataclass(frozen=True)
class Sources:
    """What the stage has read, checked against each other."""

    library: Library
    layers: tuple[Any, ...]
    damages: tuple[tuple[float, ...], ...]
    models: tuple[CostModel, ...]

    @classmethod
    def load(
        cls,
        library_path: Path,
        scores_path: Path,
        targets: Sequence[Target],
        times: KernelTimes,
        engine: Engine,
        rule: DamageRule,
        windows: Windows,
    ) -> Sources:
        """Read library and scores and make the cost models."""
        library = Library.load(require_input(library_path, "block library"))
        scores = Scores.load(require_input(scores_path, "scores of the blocks"))
        layers = offered(library, windows)
        searched = dataclasses.replace(library, layers=layers)
        damages = tuple(tuple(row) for row in rule.damages(searched, scores))
        shape = ModelShape.from_config(library.config)
        models = tuple(CostModel(shape, target.scenario, times, engine) for target in targets)
        return cls(library, layers, damages, models)

    def write(
        self,
        targets: Sequence[Target],
        limits: Budget,
        uniform_experts: bool,
        batch_sizes: Sequence[int] | None,
        tried: Sequence[Pairs] | None = None,
    ) -> Search:
        """The problem with these targets."""
        return write_problem(
            self.layers, self.damages, targets, self.models, limits, uniform_experts, batch_sizes, tried
        )


Writer = Callable[..., Search]  # the problem, with the ladder of batches or with `tried=` deployments and batches


def _solve(write: Writer, name: SolverName, settings: Settings, refine: bool) -> tuple[Search, list[Solution], float]:
    written = write()
    candidates = sum(len(row) for row in written.layers)
    options = " x ".join(str(len(pairs)) for pairs in written.deployed)
    print(
        f"solver {name}: {len(written.layers)} layers, {candidates} candidates, {len(written.targets)} target(s) with "
        f"{options} deployments and batches",
        flush=True,
    )
    start = time.monotonic()
    try:
        written, solutions = _refined(written, write, name, settings, refine)
    except Infeasible as error:
        raise _in_words(written, error) from error
    seconds, best = time.monotonic() - start, solutions[0]
    if best.gap is None:
        proof = "nothing proven"
    else:
        proof = "proven optimal" if best.proven and best.gap == 0 else f"gap {best.gap:.2%}, bound {best.bound:.6g}"
    print(f"solver {name}: damage {best.damage:.6g}, {proof}, {len(solutions)} plan(s), {seconds:.2f} s", flush=True)
    return written, solutions, seconds


def _refined(
    written: Search, write: Writer, name: SolverName, settings: Settings, refine: bool
) -> tuple[Search, list[Solution]]:
    """Solve, and again with batches around those chosen, as long as that finds a better plan."""
    deadline = time.monotonic() + settings.time_limit_seconds
    solutions = SOLVERS[name](written.problem, settings)
    while refine and (tried := finer(written.deployed, solutions[0].options)) is not None:
        left = max(1e-3, deadline - time.monotonic())
        closer = write(tried=tried)
        again = dataclasses.replace(settings, time_limit_seconds=left, known=solutions[0].chosen)
        try:
            found = SOLVERS[name](closer.problem, again)
        except ValueError:  # a baseline without luck: the plan at hand stays
            break
        if found[0].damage >= solutions[0].damage:
            break
        written, solutions = closer, [_proven_by_both(solutions[0], found[0], settings), *found[1:]]
    for solution in solutions:
        check_totals(written, solution)
    return written, solutions


def _proven_by_both(before: Solution, after: Solution, settings: Settings) -> Solution:
    """The later plan with the bound that holds for the batches of both searches."""
    if before.bound is None or after.bound is None:
        return after
    # The earlier search holds the earlier plan only: when that is beaten, its bound may be above the later damage.
    bound = min(before.bound, after.bound, after.damage)
    gap = 0.0 if bound == after.damage else (after.damage - bound) / (abs(after.damage) or 1.0)
    return dataclasses.replace(after, bound=bound, gap=gap, proven=gap <= settings.relative_gap)


def _in_words(written: Search, error: Infeasible) -> Infeasible:
    """The error with what its plan would reach in every target."""
    if error.chosen is None:
        return error
    blocks = written.blocks(error.chosen)
    lines = [str(error), "In the deployment and batch that come nearest, that plan reaches:"]
    for position, (target, model, parent) in enumerate(zip(written.targets, written.models, written.parents)):
        excess = [
            max((limit.excess(error.chosen) for limit in option.limits), default=0.0)
            for option in written.problem.choices[position]
        ]
        where = describe(target.scenario)
        if min(excess) == math.inf:
            lines.append(f"- {where}: it cannot be served")
            continue
        nearest = written.deployed[position][excess.index(min(excess))]
        lines.append(f"- {where}: {_speed(model.predict(blocks, *nearest), parent)}")
    names = [row[index].name for row, index in zip(written.layers, error.chosen)]
    lines.append(f"Its candidates, layer by layer: {names}")
    return Infeasible("\n".join(lines), error.chosen, error.options, error.needs, error.proven)


def _speed(child: Prediction, parent: Prediction | None) -> str:
    over = "" if parent is None else f", {child.tokens_per_second / parent.tokens_per_second:.3g}x the parent"
    return (
        f"{child.tokens_per_second:.6g} tokens/s{over}, {child.memory_gib:.4g} GiB, {child.latency_seconds:.4g} s per "
        f"request (tensor parallel {child.deployment.tensor_parallel}, batch {child.batch_size})"
    )


def _faster(targets: Sequence[Target], over_parent: float) -> list[Target]:
    """The targets with another throughput over the parent's asked of the first one."""
    budget = dataclasses.replace(
        targets[0].budget, throughput_over_parent=over_parent, throughput_tokens_per_second=None
    )
    return [Target(targets[0].scenario, budget), *targets[1:]]


def _sweep_point(write: Writer, name: SolverName, settings: Settings, refine: bool, over_parent: float) -> SweepPoint:
    try:
        _, solutions = _refined(write(), write, name, dataclasses.replace(settings, num_solutions=1), refine)
    except Infeasible:
        return SweepPoint(over_parent, None, False)
    return SweepPoint(over_parent, solutions[0].damage, solutions[0].proven)
