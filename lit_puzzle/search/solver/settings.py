"""Settings of a solver, and the plans that it starts from or must avoid.

Reads and writes nothing.

Source: arXiv 2411.19146 for alternatives that differ in a share `1 - alpha` of their layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

SolverName = Literal["mip", "greedy", "uniform", "random", "max_parameters"]


@dataclass(frozen=True)
class SolverSettings:
    """How to solve, and how long.

    Args:
        name: mip is exact and proves its optimum; the others are baselines
            (`lit_puzzle.search.solver.baselines`).
        num_solutions: number of plans; the first is the best, the others are alternatives to it.
        alpha: largest share of layers that an alternative may have in common with each plan before it.
        time_limit_seconds: wall-clock time for the best plan, and once more for all alternatives together. When the
            time is up, the best plan found so far is returned with its bound.
        sweep_time_limit_seconds: wall-clock time for all points of a sweep together.
        relative_gap: relative optimality gap at which the search stops; 0 proves the optimum.
        refine: whether to solve again with finer batch sizes around the chosen ones, as long as that finds a better
            plan; batch sizes that the user lists are never refined.
        seed: seed of the solver `random`.

    Raises:
        ValueError: a value is out of its range.
    """

    name: SolverName = "mip"
    num_solutions: int = 1
    alpha: float = 0.8
    time_limit_seconds: float = 60.0
    sweep_time_limit_seconds: float = 180.0
    relative_gap: float = 0.0
    refine: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in get_args(SolverName):
            raise ValueError(f"unknown solver {self.name!r}; allowed: {list(get_args(SolverName))}")
        if self.num_solutions < 1:
            raise ValueError(f"num_solutions must be at least 1, got {self.num_solutions}")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha must be at least 0 and below 1 (1 would give the same plan again): {self.alpha}")
        if not self.time_limit_seconds > 0:
            raise ValueError(f"time_limit_seconds must be positive, got {self.time_limit_seconds}")
        if not self.sweep_time_limit_seconds > 0:
            raise ValueError(f"sweep_time_limit_seconds must be positive, got {self.sweep_time_limit_seconds}")
        if not 0 <= self.relative_gap < 1:
            raise ValueError(f"relative_gap must be at least 0 and below 1, got {self.relative_gap}")


@dataclass(frozen=True)
class EarlierPlans:
    """Plans that were found before; candidate indices, one per layer.

    Attributes:
        start: a plan to start from; it is used when it is within all limits.
        unlike: plans that every new plan must differ from, as `SolverSettings.alpha` says.
    """

    start: tuple[int, ...] | None = None
    unlike: tuple[tuple[int, ...], ...] = ()


DEFAULT_SETTINGS = SolverSettings()
NO_EARLIER_PLANS = EarlierPlans()
