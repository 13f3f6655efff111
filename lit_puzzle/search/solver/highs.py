"""One linear program of the search, relaxed or in whole numbers, handed to HiGHS and its answer handed back.

A program has one column per candidate, one equality per layer (exactly one candidate) and one row per limit, scaled so
that its bound is about 1. Relaxed bounds do not rest on HiGHS' tolerances: its row prices lambda >= 0 are put into the
Lagrangian

    bound(lambda) = sum_l min_c ( cost_lc + sum_r lambda_r a_rlc ) - sum_r lambda_r room_r,

which is a true lower bound for any lambda. With `relief` the limits may be exceeded at a price (elastic program): the
objective is then t, where row r may reach room_r + relief_r t.

Shape legend: C candidates of all layers one after the other, R limits.
Memory: 8 R C bytes, and what HiGHS holds. Source: HiGHS (Huangfu and Hall, 2018) through `highspy`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import highspy
import numpy as np
from highspy._core import _Highs  # `highspy.Highs` adds callbacks and prints a banner that cannot be switched off
from numpy.typing import NDArray

from lit_puzzle.search.solver.choices import Limit

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

ROW_TOLERANCE = 1e-10  # the smallest HiGHS takes: its default of 1e-7 would find plans that miss a budget
WHOLE_TOLERANCE = 1e-8  # of whole numbers and of damages; 1e-10 made the same proofs ten times slower
STATUS = highspy.HighsModelStatus
NOTHING_THERE = (STATUS.kInfeasible, STATUS.kObjectiveBound, STATUS.kUnboundedOrInfeasible, STATUS.kObjectiveTarget)


@dataclass(frozen=True)
class Row:
    """A limit as a row, without the candidates that it rules out by itself.

    Attributes:
        values_C: Scaled coefficients; 0 where ruled out.
        room: Scaled bound less constant.
        relief: What one unit of t adds to the room in an elastic program.
        allowed_C: Candidates that are not ruled out.
    """

    values_C: Floats
    room: float
    relief: float
    allowed_C: Flags

    @classmethod
    def of(cls, limit: Limit, elastic: bool) -> Row:
        """Flatten and scale; a candidate that breaks the limit even beside the cheapest others is ruled out."""
        layers = [np.asarray(row, dtype=np.float64) for row in limit.coefficients]
        room = limit.bound - limit.constant
        allowed = [np.isfinite(row) for row in layers]
        if not elastic and all(flags.any() for flags in allowed):
            least = [float(row[flags].min()) for row, flags in zip(layers, allowed)]
            spare = room + limit.tolerance - math.fsum(least)
            allowed = [flags & (row - low <= spare) for row, flags, low in zip(layers, allowed, least)]
        allowed_C = np.concatenate(allowed)
        values_C = np.where(allowed_C, np.concatenate(layers), 0.0)
        scale = max(abs(room), float(np.abs(values_C).max())) or 1.0
        return cls(values_C / scale, room / scale, (abs(limit.bound) or 1.0) / scale, allowed_C)


@dataclass(frozen=True)
class LinearProgram:
    """What HiGHS is asked.

    Attributes:
        starts: First column of every layer, and the number of columns.
        cost_C: Objective per candidate.
        matrix_RC: Rows' coefficients.
        room_R: Rows' upper bounds.
        allowed_C: Candidates that may be taken.
        relief_R: None, or the relief of every row: the objective is then t alone.
    """

    starts: tuple[int, ...]
    cost_C: Floats
    matrix_RC: Floats
    room_R: Floats
    allowed_C: Flags
    relief_R: Floats | None = None

    @classmethod
    def of(cls, starts: tuple[int, ...], cost_C: Floats, rows: Sequence[Row], elastic: bool) -> LinearProgram:
        """Stack rows."""
        matrix_RC = np.array([row.values_C for row in rows]).reshape(len(rows), len(cost_C))
        allowed_C = np.logical_and.reduce([np.ones(len(cost_C), dtype=bool), *(row.allowed_C for row in rows)])
        relief_R = np.array([row.relief for row in rows]) if elastic else None
        return cls(starts, cost_C, matrix_RC, np.array([row.room for row in rows]), allowed_C, relief_R)

    def every_layer_has_one(self) -> bool:
        """Whether each layer has a candidate that may be taken."""
        return bool(np.logical_or.reduceat(self.allowed_C, self.starts[:-1]).all())

    def without_worse(self, relaxation: Relaxation, cutoff: float) -> LinearProgram:
        """The program less the candidates that no plan below `cutoff` can hold."""
        if not math.isfinite(cutoff):
            return self
        return replace(self, allowed_C=self.allowed_C & (relaxation.bound + relaxation.extra_C <= cutoff))


@dataclass(frozen=True)
class Relaxation:
    """A lower bound.

    Attributes:
        bound: No plan of the program costs less.
        extra_C: A plan with this candidate costs at least `bound` + this.
    """

    bound: float
    extra_C: Floats

    def cutoff_that_keeps(self, columns: int) -> float:
        """A cutoff below which about so many candidates remain; inf when that is all of them."""
        return math.inf if columns >= len(self.extra_C) else self.bound + float(np.sort(self.extra_C)[columns])


@dataclass(frozen=True)
class Outcome:
    """What HiGHS said about a program in whole numbers.

    Attributes:
        chosen: Candidate of every layer; None when nothing was found, at least below the cutoff.
        objective: HiGHS' own sum for it.
        bound: Nothing in the program is below this and below the cutoff.
        finished: False when the time was up.
    """

    chosen: tuple[int, ...] | None
    objective: float
    bound: float
    finished: bool


def relax(program: LinearProgram) -> Relaxation | None:
    """Lower bound of a program by its linear relaxation; None when even that has no solution."""
    if not program.every_layer_has_one():
        return None
    solver, _ = _load(program, whole=False)
    solver.setOptionValue("presolve", "off")  # costs more than these few rows take to solve
    solver.run()
    status = solver.getModelStatus()
    if status in NOTHING_THERE:
        return None
    rows = len(program.room_R)
    # Without an optimum (numerical trouble) the prices 0 still give a true, if weak, bound.
    duals_R = np.array(solver.getSolution().row_dual[:rows]) if status == STATUS.kOptimal else np.zeros(rows)
    return _lagrangian(program, np.maximum(0.0, -duals_R))


def _lagrangian(program: LinearProgram, prices_R: Floats) -> Relaxation:
    if program.relief_R is not None:  # t would run away if relief were sold above its price of 1
        prices_R = prices_R / max(1.0, float(prices_R @ program.relief_R))
    cost_C = np.zeros_like(program.cost_C) if program.relief_R is not None else program.cost_C
    priced_C = np.where(program.allowed_C, cost_C + prices_R @ program.matrix_RC, math.inf)
    least_L = np.minimum.reduceat(priced_C, program.starts[:-1])
    bound = math.fsum(least_L.tolist()) - float(prices_R @ program.room_R)
    if program.relief_R is not None:
        bound = max(0.0, bound)
    return Relaxation(bound, priced_C - np.repeat(least_L, np.diff(program.starts)))


def solve(program: LinearProgram, cutoff: float, relative_gap: float, seconds: float) -> Outcome:
    """The best plan of a program, unless it costs more than `cutoff`: then any plan, or none, and a bound above it."""
    if not program.every_layer_has_one():
        return Outcome(None, math.inf, math.inf, finished=True)
    solver, columns = _load(program, whole=True)
    solver.setOptionValue("time_limit", max(seconds, 1e-3))
    solver.setOptionValue("mip_rel_gap", relative_gap)
    if math.isfinite(cutoff):
        solver.setOptionValue("objective_bound", cutoff)  # HiGHS may stop at plans above it
    solver.run()
    status, info = solver.getModelStatus(), solver.getInfo()
    if status in NOTHING_THERE:
        return Outcome(None, math.inf, cutoff, finished=True)
    finished = status == STATUS.kOptimal
    if not finished and status != STATUS.kTimeLimit:
        raise RuntimeError(f"HiGHS stopped with status {solver.modelStatusToString(status)}")
    has_plan = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    values = np.array(solver.getSolution().col_value) if has_plan else None
    chosen = None if values is None else _read_choice(program, columns, values)
    objective = info.objective_function_value if has_plan else math.inf
    return Outcome(chosen, objective, info.mip_dual_bound, finished)


def _read_choice(program: LinearProgram, columns: NDArray[np.int64], values: Floats) -> tuple[int, ...]:
    full_C = np.zeros(len(program.cost_C))
    full_C[columns] = values[: len(columns)]
    layers = zip(program.starts[:-1], program.starts[1:])
    return tuple(int(np.argmax(full_C[begin:end])) for begin, end in layers)


def _load(program: LinearProgram, whole: bool) -> tuple[_Highs, NDArray[np.int64]]:
    """A solver holding the program, and which candidate each of its columns is; t, if any, is the last column."""
    columns = np.flatnonzero(program.allowed_C)
    layers = len(program.starts) - 1
    layer_of = np.repeat(np.arange(layers), np.diff(program.starts))[columns]
    one_per_layer = (layer_of[None, :] == np.arange(layers)[:, None]).astype(np.float64)
    matrix = np.vstack([program.matrix_RC[:, columns], one_per_layer])
    cost, upper = program.cost_C[columns], np.ones(len(columns))
    lower_rows = np.concatenate([np.full(len(program.room_R), -math.inf), np.ones(layers)])
    upper_rows = np.concatenate([program.room_R, np.ones(layers)])
    if program.relief_R is not None:
        matrix = np.hstack([matrix, np.concatenate([-program.relief_R, np.zeros(layers)])[:, None]])
        cost, upper = np.append(np.zeros(len(columns)), 1.0), np.append(upper, math.inf)
    model = _columnwise(matrix, cost, upper, lower_rows, upper_rows)
    if whole:
        kinds = [highspy.HighsVarType.kInteger] * len(columns)
        relief = [] if program.relief_R is None else [highspy.HighsVarType.kContinuous]
        model.integrality_ = kinds + relief
    solver = _quiet_solver()
    solver.passModel(model)
    return solver, columns


def _columnwise(matrix: Floats, cost: Floats, upper: Floats, lower_rows: Floats, upper_rows: Floats) -> highspy.HighsLp:
    model = highspy.HighsLp()
    model.num_row_, model.num_col_ = matrix.shape
    model.col_cost_, model.col_lower_, model.col_upper_ = cost, np.zeros(len(cost)), upper
    model.row_lower_, model.row_upper_ = lower_rows, upper_rows
    transposed = matrix.T
    used = transposed != 0
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = np.concatenate([[0], np.cumsum(used.sum(axis=1))]).astype(np.int32)
    model.a_matrix_.index_ = np.nonzero(used)[1].astype(np.int32)
    model.a_matrix_.value_ = transposed[used]
    return model


def _quiet_solver() -> _Highs:
    solver = _Highs()
    settings: dict[str, bool | int | float] = {
        "output_flag": False,
        "threads": 1,
        "mip_abs_gap": 0.0,
        "mip_feasibility_tolerance": WHOLE_TOLERANCE,
        "primal_feasibility_tolerance": ROW_TOLERANCE,
        "dual_feasibility_tolerance": ROW_TOLERANCE,
    }
    for name, value in settings.items():
        if solver.setOptionValue(name, value) != highspy.HighsStatus.kOk:
            raise RuntimeError(f"HiGHS does not take {name} = {value!r}")
    return solver
