"""One linear program of the search, relaxed or mixed-integer, solved by HiGHS.

A program has one column per candidate, one equality per layer (exactly one candidate) and one row per limit, scaled so
that its bound is about 1. Bounds of relaxations do not depend on HiGHS' tolerances: the row duals lambda >= 0 that it
returns are put into the Lagrangian

    bound(lambda) = sum_l min_c ( cost_lc + sum_r lambda_r a_rlc ) - sum_r lambda_r room_r,

which is a valid lower bound for any lambda >= 0. In an elastic program the limits may be exceeded: its objective is t,
and row r is bounded by room_r + relief_r t.

Reads and writes nothing. Memory: 8 R C bytes, and what HiGHS allocates.

Source: HiGHS (Huangfu and Hall, 2018) through `highspy`.
Shape legend: C candidates of all layers in a row, R limits, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import highspy
import numpy as np
from highspy._core import _Highs  # `highspy.Highs` prints a banner that cannot be switched off
from numpy.typing import NDArray

from lit_puzzle.search.solver.choices import Limit

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

ROW_TOLERANCE = 1e-10  # the smallest that HiGHS accepts: with its default of 1e-7 plans may miss a budget
INTEGER_TOLERANCE = 1e-8  # of integrality and of the objective; with 1e-10 the same proofs took ten times longer
STATUS = highspy.HighsModelStatus
NO_PLAN = (STATUS.kInfeasible, STATUS.kObjectiveBound, STATUS.kUnboundedOrInfeasible, STATUS.kObjectiveTarget)


@dataclass(frozen=True)
class Row:
    """A limit as a row, without the candidates that it rules out on its own.

    Attributes:
        values_C: scaled coefficients; 0 where ruled out.
        room: scaled bound minus constant.
        relief: what one unit of t adds to the room in an elastic program.
        allowed_C: candidates that are not ruled out.
    """

    values_C: Floats
    room: float
    relief: float
    allowed_C: Flags

    @classmethod
    def of(cls, limit: Limit, elastic: bool) -> Row:
        """Flatten and scale; a candidate that exceeds the limit even beside the cheapest others is ruled out."""
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
        relief = 0.0 if limit.hard else abs(limit.bound) or 1.0
        return cls(values_C / scale, room / scale, relief / scale, allowed_C)


@dataclass(frozen=True)
class LinearProgram:
    """A program for HiGHS.

    Attributes:
        starts: first column of every layer, and the number of columns.
        cost_C: objective of every candidate.
        matrix_RC: coefficients of the rows.
        room_R: upper bounds of the rows.
        allowed_C: candidates that may be taken.
        relief_R: None, or the relief of every row in an elastic program, whose objective is t alone.
    """

    starts: tuple[int, ...]
    cost_C: Floats
    matrix_RC: Floats
    room_R: Floats
    allowed_C: Flags
    relief_R: Floats | None = None

    @classmethod
    def of(cls, starts: tuple[int, ...], cost_C: Floats, rows: Sequence[Row], elastic: bool) -> LinearProgram:
        """Stack rows into a program."""
        matrix_RC = np.array([row.values_C for row in rows]).reshape(len(rows), len(cost_C))
        allowed_C = np.logical_and.reduce([np.ones(len(cost_C), dtype=bool), *(row.allowed_C for row in rows)])
        relief_R = np.array([row.relief for row in rows]) if elastic else None
        return cls(starts, cost_C, matrix_RC, np.array([row.room for row in rows]), allowed_C, relief_R)

    def every_layer_has_candidates(self) -> bool:
        """Return whether each layer has a candidate that may be taken."""
        return bool(np.logical_or.reduceat(self.allowed_C, self.starts[:-1]).all())

    def without_worse(self, relaxation: Relaxation, cutoff: float) -> LinearProgram:
        """Return the program without the candidates that no plan below `cutoff` can have."""
        if not math.isfinite(cutoff):
            return self
        return replace(self, allowed_C=self.allowed_C & (relaxation.bound + relaxation.extra_C <= cutoff))


@dataclass(frozen=True)
class Relaxation:
    """Lower bounds of a program.

    Attributes:
        bound: lower bound on the objective of any plan.
        extra_C: the objective of a plan with candidate c is at least bound + extra_C[c].
    """

    bound: float
    extra_C: Floats

    def cutoff_that_keeps(self, columns: int) -> float:
        """Return a cutoff below which about this many candidates remain; inf when that is all of them."""
        return math.inf if columns >= len(self.extra_C) else self.bound + float(np.sort(self.extra_C)[columns])


@dataclass(frozen=True)
class Outcome:
    """The result of a mixed-integer program.

    Attributes:
        chosen: candidate of every layer; None when no plan was found, at least below the cutoff.
        objective: the objective that HiGHS reports for it.
        bound: no plan of the program is below both this and the cutoff.
        finished: False when the time limit was reached.
    """

    chosen: tuple[int, ...] | None
    objective: float
    bound: float
    finished: bool


def relax(program: LinearProgram) -> Relaxation | None:
    """Return the lower bounds of a program from its linear relaxation; None when the relaxation is infeasible."""
    if not program.every_layer_has_candidates():
        return None
    solver, _ = _load(program, integer=False)
    solver.setOptionValue("presolve", "off")  # takes longer than to solve these few rows
    solver.run()
    status = solver.getModelStatus()
    if status in NO_PLAN:
        return None
    rows = len(program.room_R)
    # Without an optimum (numerical trouble) duals of 0 still give a valid, if weak, bound.
    duals_R = np.array(solver.getSolution().row_dual[:rows]) if status == STATUS.kOptimal else np.zeros(rows)
    return _lagrangian(program, np.maximum(0.0, -duals_R))


def _lagrangian(program: LinearProgram, duals_R: Floats) -> Relaxation:
    if program.relief_R is not None:  # bounded in t only when lambda . relief <= 1, the objective coefficient of t
        duals_R = duals_R / max(1.0, float(duals_R @ program.relief_R))
    cost_C = np.zeros_like(program.cost_C) if program.relief_R is not None else program.cost_C
    priced_C = np.where(program.allowed_C, cost_C + duals_R @ program.matrix_RC, math.inf)
    least_L = np.minimum.reduceat(priced_C, program.starts[:-1])
    bound = math.fsum(least_L.tolist()) - float(duals_R @ program.room_R)
    if program.relief_R is not None:
        bound = max(0.0, bound)
    return Relaxation(bound, priced_C - np.repeat(least_L, np.diff(program.starts)))


def solve(program: LinearProgram, cutoff: float, relative_gap: float, seconds: float) -> Outcome:
    """Solve a mixed-integer program.

    Args:
        program: the program.
        cutoff: plans above it do not matter: the outcome may then be any plan or none, with a bound of at least this.
        relative_gap: relative optimality gap at which HiGHS stops.
        seconds: time limit.

    Raises:
        RuntimeError: HiGHS stops for another reason than optimality, infeasibility or the time limit.
    """
    if not program.every_layer_has_candidates():
        return Outcome(None, math.inf, math.inf, finished=True)
    solver, columns = _load(program, integer=True)
    solver.setOptionValue("time_limit", max(seconds, 1e-3))
    solver.setOptionValue("mip_rel_gap", relative_gap)
    if math.isfinite(cutoff):
        solver.setOptionValue("objective_bound", cutoff)  # HiGHS may stop when its bound is above it
    solver.run()
    status, info = solver.getModelStatus(), solver.getInfo()
    if status in NO_PLAN:
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


def _load(program: LinearProgram, integer: bool) -> tuple[_Highs, NDArray[np.int64]]:
    """Return a solver with the program, and the candidate of each of its columns; t, if any, is the last column."""
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
    if integer:
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
        "mip_feasibility_tolerance": INTEGER_TOLERANCE,
        "primal_feasibility_tolerance": ROW_TOLERANCE,
        "dual_feasibility_tolerance": ROW_TOLERANCE,
    }
    for name, value in settings.items():
        if solver.setOptionValue(name, value) != highspy.HighsStatus.kOk:
            raise RuntimeError(f"HiGHS refuses the option {name} = {value!r}")
    return solver
