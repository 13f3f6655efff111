"""From a problem to plans: solve, refine the batches around those chosen, look for alternatives, sweep a budget.

The best plan comes first and has the whole time limit: over the ladder of batches, then over finer ones around those
it chose, as long as that finds a better plan. Alternatives are looked for afterwards, over all deployments and batches
tried before, with a time limit of their own, and a sweep has another: neither can cost the plan found, nor its proof.

What is proven is proven for the deployments and batches tried.

Source: arXiv 2411.19146 (several plans that differ, one program per batch size).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_puzzle.costs.cost_model import Prediction
from lit_puzzle.search.limits import describe_all
from lit_puzzle.search.plan_record import check_totals
from lit_puzzle.search.program import SearchProgram
from lit_puzzle.search.report import SweepPoint
from lit_puzzle.search.solver.baselines import SOLVERS
from lit_puzzle.search.solver.batches import Pairs, finer
from lit_puzzle.search.solver.choices import Infeasible, OutOfTimeError, Settings, Solution
from lit_puzzle.spec import Target

WriteProgram = Callable[
    ..., SearchProgram
]  # the problem, with the ladder of batches or with `tried=` deployments and batches
EXACT = ("mip", "max_parameters")  # the solvers that can give more than one plan
SHORTEST = 1e-3  # seconds: what a solver gets when nothing is left


@dataclass(frozen=True)
class Rounds:
    """How to solve.

    Attributes:
        solver: Name in `SOLVERS`.
        settings: Time limit of the best plan, and again of all alternatives together.
        refine: Whether to try finer batches than those written first.
    """

    solver: str
    settings: Settings
    refine: bool

    def solve(self, write: WriteProgram, program: SearchProgram) -> tuple[SearchProgram, list[Solution]]:
        """The best plan and its alternatives, and the search with all deployments and batches that were tried.

        Raises:
            Infeasible: No plan was found; in words.
            OutOfTimeError: None was found in time.
            DisagreementError: The solver's totals are not those of the cost model.
        """
        program, best = self.best(write, program)
        later = self._alternatives(program, best)
        for solution in later:
            check_totals(program, solution)
        return program, [best, *later]

    def best(self, write: WriteProgram, program: SearchProgram) -> tuple[SearchProgram, Solution]:
        """The best plan alone; see `solve`."""
        deadline = time.monotonic() + self.settings.time_limit_seconds
        # The other solvers say themselves that they give one plan only.
        only_one = dataclasses.replace(self.settings, num_solutions=1) if self.solver in EXACT else self.settings
        try:
            best = SOLVERS[self.solver](program.problem, only_one)[0]
        except Infeasible as error:
            raise in_words(program, error) from error
        while self.refine and (tried := finer(program.deployed, best.options)) is not None:
            left = max(SHORTEST, deadline - time.monotonic())
            closer = write(tried=tried)
            again = dataclasses.replace(only_one, time_limit_seconds=left, known=best.chosen)
            try:
                found = SOLVERS[self.solver](closer.problem, again)[0]
            except (Infeasible, OutOfTimeError):  # a baseline without luck, or no time: the plan at hand stays
                break
            better = found.quality_loss < best.quality_loss
            if better or (found.proven and best.proven):  # else the time was up: keep the bound that is known
                program, best = _together(write, program, closer, best, found, self.settings.relative_gap)
            if not better:
                break
        check_totals(program, best)
        return program, best

    def _alternatives(self, program: SearchProgram, best: Solution) -> list[Solution]:
        """Later plans over everything tried; those that are found in time."""
        if self.settings.num_solutions == 1 or self.solver not in EXACT:
            return []
        more = dataclasses.replace(
            self.settings, num_solutions=self.settings.num_solutions - 1, unlike=(best.chosen,), known=None
        )
        try:
            return SOLVERS[self.solver](program.problem, more)
        except OutOfTimeError:
            print(f"solver {self.solver}: no alternative was found in {more.time_limit_seconds:g} s", flush=True)
            return []

    def sweep(self, writers: Sequence[tuple[float, WriteProgram]], seconds: float) -> list[SweepPoint]:
        """The damage of every budget, in the order given; each gets an even part of the time that is left.

        Args:
            writers: The throughput over the parent's, and the problem with it.
            seconds: For all of them together.
        """
        deadline, points = time.monotonic() + seconds, []
        for position, (over_parent, write) in enumerate(writers):
            left = max(SHORTEST, (deadline - time.monotonic()) / (len(writers) - position))
            settings = dataclasses.replace(self.settings, num_solutions=1, time_limit_seconds=left)
            try:
                _, best = dataclasses.replace(self, settings=settings).best(write, write())
            except Infeasible as error:
                points.append(SweepPoint(over_parent, None, error.proven))
            except OutOfTimeError:
                points.append(SweepPoint(over_parent, None, False))
            else:
                points.append(SweepPoint(over_parent, best.quality_loss, best.proven))
        return points


def _together(
    write: WriteProgram,
    before: SearchProgram,
    after: SearchProgram,
    best: Solution,
    found: Solution,
    relative_gap: float,
) -> tuple[SearchProgram, Solution]:
    """Both searches as one with all that they tried, and the better of their plans with the bound that holds there."""
    tried: list[Pairs] = [
        [*old, *(pair for pair in new if pair not in old)] for old, new in zip(before.deployed, after.deployed)
    ]
    both, plan, source = write(tried=tried), best, before
    if found.quality_loss < best.quality_loss:
        plan, source = found, after
    taken = (pairs[index] for pairs, index in zip(source.deployed, plan.options))
    plan = dataclasses.replace(plan, options=tuple(list(pairs).index(pair) for pairs, pair in zip(tried, taken)))
    if best.bound is None or found.bound is None:
        return both, plan
    # The earlier search holds the earlier plan only: when that is beaten, its bound may be above the later damage.
    return both, plan.with_bound(min(best.bound, found.bound, plan.quality_loss), relative_gap)


def in_words(program: SearchProgram, error: Infeasible) -> Infeasible:
    """The error with what its plan would reach in every target."""
    if error.chosen is None:
        return error
    blocks = program.blocks(error.chosen)
    lines = [str(error), "In the deployment and batch that come nearest, that plan reaches:"]
    for position, where in enumerate(describe_all(program.targets)):
        model, parent = program.models[position], program.parents[position]
        excess = [
            max((limit.excess(error.chosen) for limit in option.limits), default=0.0)
            for option in program.problem.choices[position]
        ]
        if min(excess) == math.inf:
            lines.append(f"- {where}: it cannot be served")
            continue
        nearest = program.deployed[position][excess.index(min(excess))]
        lines.append(f"- {where}: {_speed(model.predict(blocks, *nearest), parent)}")
    names = [row[index].name for row, index in zip(program.layers, error.chosen)]
    lines.append(f"Its candidates, layer by layer: {names}")
    return Infeasible("\n".join(lines), error.chosen, error.options, error.needs, error.proven)


def _speed(child: Prediction, parent: Prediction | None) -> str:
    over = "" if parent is None else f", {child.tokens_per_second / parent.tokens_per_second:.3g}x the parent"
    return (
        f"{child.tokens_per_second:.6g} tokens/s{over}, {child.memory_gib:.4g} GiB, {child.latency_seconds:.4g} s per "
        f"request (tensor parallel {child.deployment.tensor_parallel}, batch {child.batch_size})"
    )


def faster(targets: Sequence[Target], over_parent: float) -> list[Target]:
    """The targets with another throughput over the parent's asked of the first one.

    Raises:
        ValueError: It is no positive finite number.
    """
    budget = dataclasses.replace(
        targets[0].budget, throughput_over_parent=over_parent, throughput_tokens_per_second=None
    )
    return [Target(targets[0].scenario, budget), *targets[1:]]
