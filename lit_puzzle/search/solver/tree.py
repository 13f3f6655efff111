"""Branch and bound over options, with a mixed-integer program in each leaf.

Every scenario has options (deployment x batch size), of which one must hold. Their product is not enumerated: a node
of the tree fixes options of the first scenarios. Its bound is that of its linear relaxation, and at least the bound of
each of its options alone; the node with the lowest bound is opened first. Where all options are fixed, HiGHS solves the
mixed-integer program without the candidates that the relaxation shows to be above a cutoff. The first cutoff is a guess
that keeps about 3 candidates per layer; when no plan is found below it, the cutoff is a proven bound of the node, which
goes back into the queue with twice as many candidates.
The search ends when no bound is below the best quality loss. A plan is reported as optimal only when quality_loss -
bound <= 1e-9 of the absolute values that it adds up; otherwise its bound is reported.

Every plan that HiGHS returns is added up again in plain Python: a different quality loss is a `DisagreementError`; a
plan that exceeds a bound by more than rounding is excluded by a cut, and the program is solved again.

Reads and writes nothing.

Source: Land and Doig, 1960 (branch and bound); arXiv 2411.19146 (the program in the leaves).
Shape legend: C candidates of all layers in a row, L layers.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lit_puzzle.search.solver import highs
from lit_puzzle.search.solver.choices import ChoiceProblem, DisagreementError, Grid, Limit, Solution
from lit_puzzle.search.solver.extended import label_choice
from lit_puzzle.search.solver.highs import Flags, Floats, LinearProgram, Outcome, Relaxation, Row

LARGEST = 100.0  # the largest loss of one candidate after scaling: HiGHS' tolerances are absolute, about 1e-8
SAME_LOSS = 1e-8  # after scaling: two plans whose losses differ by less are equally good
PROVEN = 1e-9  # of the absolute losses that a plan adds up: a bound this close counts as the loss itself
OBJECTIVE_TOLERANCE = 1e-6  # relative: how far the objective of HiGHS may be off, for columns at 1 - 1e-8 and rounding
MAX_CUTS = 100
FIRST_COLUMNS = 3  # candidates per layer that the first mixed-integer program of a node keeps
DEFAULT_SECONDS = 3600.0


def indicator(shape: Grid, chosen: Sequence[int]) -> list[list[float]]:
    """Return a grid with 1 for the candidates of a plan and 0 for the others."""
    return [[float(index == taken) for index in range(len(row))] for row, taken in zip(shape, chosen)]


@dataclass(order=True)
class Node:
    """Options of the first scenarios; ordered by bound, then by the number of scenarios without an option.

    Attributes:
        bound: lower bound on the scaled objective of any plan below this node.
        undecided: number of choices without an option.
        number: running number; breaks ties.
        options: options of the first choices.
        relaxed: whether the bound is that of the node's own relaxation.
        columns: candidates that its next mixed-integer program keeps; 0 before the first.
    """

    bound: float
    undecided: int
    number: int
    options: tuple[int, ...] = field(compare=False)
    relaxed: bool = field(compare=False)
    columns: int = field(default=0, compare=False)


class Tree:
    """One search for one best plan; see the module's docstring.

    Args:
        problem: the problem to solve.
        relative_gap: relative optimality gap at which the search stops.
        deadline: when to stop, by the monotonic clock; None is an hour from now.
        cuts: more limits of every plan.
        elastic: minimize the largest relative excess over the limits instead of the quality loss.
        ceiling: quality loss of a plan that is known to be within all limits; plans above it are not searched.

    Attributes:
        timed_out: whether the deadline passed before the search ended.
    """

    def __init__(
        self,
        problem: ChoiceProblem,
        relative_gap: float = 0.0,
        deadline: float | None = None,
        cuts: tuple[Limit, ...] = (),
        elastic: bool = False,
        ceiling: float = math.inf,
    ) -> None:
        self.problem, self.relative_gap, self.elastic = problem, relative_gap, elastic
        self.always = (*problem.limits, *cuts)
        self.deadline = time.monotonic() + DEFAULT_SECONDS if deadline is None else deadline
        self.choices = problem.choices + label_choice(problem)
        self.starts = (0, *itertools.accumulate(len(row) for row in problem.quality_loss))
        quality_loss_C = np.array([value for row in problem.quality_loss for value in row])
        self.base = [self._row(limit) for limit in self.always]
        self.useful_C = self._useful(quality_loss_C, ceiling)
        self.scale = float(np.abs(quality_loss_C[self.useful_C]).max(initial=0.0)) / LARGEST or 1.0
        self.cost_C = np.where(self.useful_C, quality_loss_C / self.scale, 0.0)
        self.option_rows = [[[self._row(limit) for limit in o.limits] for o in options] for options in self.choices]
        self.best: tuple[float, tuple[int, ...], tuple[int, ...]] | None = None  # scaled objective, chosen, options
        self.closed_bound = math.inf  # lowest bound of the nodes that were closed because they are not better
        self.heap: list[Node] = []
        self.counter = itertools.count()
        self.timed_out = False

    def _useful(self, quality_loss_C: Floats, ceiling: float) -> Flags:
        """Return the candidates that a plan up to the ceiling may have: allowed, and within it with the best others."""
        useful_C = np.logical_and.reduce(
            [np.ones(len(quality_loss_C), dtype=bool), *(row.allowed_C for row in self.base)]
        )
        least_L = np.minimum.reduceat(np.where(useful_C, quality_loss_C, math.inf), self.starts[:-1])
        if ceiling < math.inf:
            rounding = 1e-12 * (abs(ceiling) + float(np.abs(least_L).sum()))
            spare = ceiling - math.fsum(least_L.tolist()) + rounding
            useful_C &= quality_loss_C - np.repeat(least_L, np.diff(self.starts)) <= spare
        self.least_L: list[float] = least_L.tolist()
        return useful_C

    def rescaled(self) -> Tree | None:
        """Return this search without candidates that cannot be in a plan as good as the one found.

        Returns:
            The search, which starts from the plan found; None when its largest loss is not much smaller, or when the
            tolerances of this search are small enough.
        """
        assert self.best is not None
        _, chosen, options = self.best
        ceiling = self.problem.total_quality_loss(chosen)
        finer = Tree(
            self.problem, self.relative_gap, self.deadline, self.always[len(self.problem.limits) :], ceiling=ceiling
        )
        if self.elastic or 2 * SAME_LOSS * self.scale <= PROVEN * self._size(chosen) or finer.scale > self.scale / 2:
            return None
        finer.best = (ceiling / finer.scale, chosen, options)
        return finer

    def _size(self, chosen: Sequence[int]) -> float:
        """Return the sum of a plan's absolute losses: differences far below it are rounding."""
        taken = (row[index] for row, index in zip(self.problem.quality_loss, chosen))
        return math.fsum(max(abs(own), -least) for own, least in zip(taken, self.least_L))

    def _row(self, limit: Limit) -> Row:
        return Row.of(limit, self.elastic)

    @property
    def cutoff(self) -> float:
        """Scaled objective that a better plan must be below."""
        if self.best is None:
            return math.inf
        return self.best[0] - max(SAME_LOSS, self.relative_gap * abs(self.best[0]))

    def program(self, options: Sequence[int], more: Sequence[Row] = ()) -> LinearProgram:
        """Return the program with these options of the first choices."""
        chosen = (rows[index] for rows, index in zip(self.option_rows, options))
        return self._program([*self.base, *more, *itertools.chain(*chosen)])

    def _program(self, rows: Sequence[Row]) -> LinearProgram:
        program = LinearProgram.of(self.starts, self.cost_C, rows, self.elastic)
        return replace(program, allowed_C=program.allowed_C & self.useful_C)

    def start_from(self, chosen: tuple[int, ...]) -> None:
        """Take a plan as the best so far when it is within all limits."""
        options = self.problem.options_that_hold(chosen)
        if options is not None:
            self.best = (self.problem.total_quality_loss(chosen) / self.scale, chosen, options)

    def run(self) -> Solution | None:
        """Return the best plan; None when there is none, or when none was found before the deadline (`timed_out`)."""
        self.option_bounds = self._bound_options()
        if all(min(bounds, default=math.inf) < math.inf for bounds in self.option_bounds):
            self._push(max((min(bounds) for bounds in self.option_bounds), default=-math.inf), (), relaxed=False)
        while self.heap and self.heap[0].bound < self.cutoff:
            if time.monotonic() > self.deadline:
                self.timed_out = True
                break
            self._open(heapq.heappop(self.heap))
            if self.timed_out:
                break
        return self._solution()

    def _bound_options(self) -> list[list[float]]:
        """Return the bound of every option alone; inf when no plan has it."""

        def bound(rows: list[Row]) -> float:
            if time.monotonic() > self.deadline:
                return -math.inf  # a valid bound; the loop in `run` stops
            relaxation = highs.relax(self._program([*self.base, *rows]))
            return math.inf if relaxation is None else relaxation.bound

        if len(self.option_rows) == 1:  # the tree relaxes them itself
            return [[-math.inf] * len(options) for options in self.option_rows]
        return [[bound(rows) for rows in options] for options in self.option_rows]

    def _push(self, bound: float, options: tuple[int, ...], relaxed: bool, columns: int = 0) -> None:
        if math.isfinite(bound) and bound >= self.cutoff:
            self.closed_bound = min(self.closed_bound, bound)
        elif bound < math.inf:
            undecided = len(self.choices) - len(options)
            heapq.heappush(self.heap, Node(bound, undecided, next(self.counter), options, relaxed, columns))

    def _open(self, node: Node) -> None:
        if not node.relaxed:
            relaxation = highs.relax(self.program(node.options))
            if relaxation is not None:
                self._push(max(node.bound, relaxation.bound), node.options, relaxed=True)
        elif node.undecided:
            for index, bound in enumerate(self.option_bounds[len(node.options)]):
                self._push(max(node.bound, bound), (*node.options, index), relaxed=False)
        else:
            self._solve(node)

    def _solve(self, node: Node) -> None:
        """Solve a node with all options fixed; plans that exceed a limit by more than rounding are cut off in turn."""
        cuts: list[Row] = []
        for _ in range(MAX_CUTS):
            program = self.program(node.options, cuts)
            relaxation = highs.relax(program)
            if relaxation is None:
                return
            columns, guess = self._guess(node, relaxation)
            complete, cutoff = guess >= self.cutoff, min(guess, self.cutoff)
            smaller = program.without_worse(relaxation, cutoff)
            outcome = highs.solve(smaller, cutoff, self.relative_gap, self.deadline - time.monotonic())
            if outcome.chosen is None or self._accept(node, outcome):
                bound = max(node.bound, min(outcome.bound, cutoff))  # above the cutoff candidates were left out
                self._close(replace(node, bound=bound, columns=2 * columns), outcome.finished, complete)
                return
            grid = indicator(self.problem.quality_loss, outcome.chosen)
            cuts.append(Row.of(Limit("not this plan", grid, 0.0, self.problem.num_layers - 1.0), False))
        raise DisagreementError(f"HiGHS returned {MAX_CUTS} plans that exceed the limits of their program")

    def _guess(self, node: Node, relaxation: Relaxation) -> tuple[int, float]:
        """Return how many candidates to keep and the cutoff that keeps them, above the node's bound."""
        columns = node.columns or FIRST_COLUMNS * self.problem.num_layers
        while (guess := relaxation.cutoff_that_keeps(columns)) <= node.bound + SAME_LOSS:
            columns *= 2
        return columns, guess

    def _close(self, node: Node, finished: bool, complete: bool) -> None:
        """Close a solved node, or put it back with its new bound when candidates that matter were left out."""
        if finished and complete:
            self.closed_bound = min(self.closed_bound, node.bound)
        else:
            self._push(node.bound, node.options, relaxed=True, columns=node.columns)
        self.timed_out = self.timed_out or not finished

    def _accept(self, node: Node, outcome: Outcome) -> bool:
        """Add a plan of HiGHS up again, keep it when it is the best; return whether it is within all limits."""
        assert outcome.chosen is not None
        chosen, limits = outcome.chosen, self._limits(node)
        if any(limit.total(chosen) == math.inf for limit in limits):
            raise DisagreementError(f"HiGHS chose a forbidden candidate: {chosen}")
        if self.elastic:
            objective = max((limit.excess(chosen) for limit in limits), default=0.0)
        else:
            objective = self.problem.total_quality_loss(chosen) / self.scale
        if abs(objective - outcome.objective) > OBJECTIVE_TOLERANCE * max(LARGEST, abs(objective)):
            raise DisagreementError(
                f"HiGHS reports the objective {outcome.objective!r}, but its plan adds up to {objective!r}"
            )
        if not self.elastic and not all(limit.holds(chosen) for limit in limits):
            return False
        if self.best is None or objective < self.best[0]:
            self.best = (objective, chosen, node.options)
        return True

    def _limits(self, node: Node) -> list[Limit]:
        fixed = (options[index] for options, index in zip(self.choices, node.options))
        return [*self.always, *itertools.chain(*(option.limits for option in fixed))]

    def _solution(self) -> Solution | None:
        if self.best is None:
            return None
        objective, chosen, options = self.best
        open_bound = min((node.bound for node in self.heap), default=math.inf)
        scaled = min(objective, self.closed_bound, open_bound)
        quality_loss = self.problem.total_quality_loss(chosen)
        bound = quality_loss if objective - scaled <= PROVEN * self._size(chosen) / self.scale else scaled * self.scale
        found = Solution(chosen, quality_loss, options[: len(self.problem.choices)])
        return found.with_bound(bound, self.relative_gap)
