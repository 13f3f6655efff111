"""Settings of the search stage: what the child must reach, how it is costed, and what may be chosen.

Reads and writes nothing; needs neither torch nor a solver. The solver's own settings are in
`lit_puzzle.search.solver.settings`, those of the objective in `lit_puzzle.search.objective`.

Source: arXiv 2411.19146 (constraints, batch sizes swept), arXiv 2602.11937 (targets in two scenarios).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from lit_puzzle.costs.engine import ServingEngine
from lit_puzzle.costs.serving import KernelTimes
from lit_puzzle.environments.environment import effort_weights
from lit_puzzle.spec import Budget, Target

Windows = Literal["free", "unchanged"]
OF_A_DEPLOYMENT = (
    "memory_gib",
    "throughput_tokens_per_second",
    "throughput_over_parent",
    "requests_over_parent",
    "latency_seconds",
)


@dataclass(frozen=True)
class Constraints:
    """What the child must reach.

    Args:
        targets: deployments with a budget each; all of them hold at once.
        limits: bounds that no deployment changes: total_parameters, active_parameters, full_attention_layers.
        sweep: values of the first target's throughput_over_parent; the lowest quality loss is found for each of them
            once the plan is written.
        lengths_by: evaluation whose answer lengths `requests_over_parent` uses; None: the only one that measured any.

    Raises:
        ValueError: there is no target, a bound of `limits` depends on a deployment, a value of `sweep` is not a
            positive number, or efforts or `lengths_by` are given that no budget asks for.
    """

    targets: list[Target]
    limits: Budget = field(default_factory=Budget)
    sweep: list[float] | None = None
    lengths_by: str | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError(
                "targets is empty; name at least one scenario (with an empty budget the child must only fit its memory)"
            )
        misplaced = [name for name in OF_A_DEPLOYMENT if self.limits.to_json()[name] is not None]
        if misplaced:
            raise ValueError(f"limits: {misplaced} depend on a deployment; put them into the budget of a target")
        for target in self.targets:
            if target.efforts is not None:
                effort_weights(target.efforts)
                if target.budget.requests_over_parent is None:
                    raise ValueError(f"efforts {target.efforts} are of requests_over_parent, which the budget lacks")
        if self.lengths_by and all(target.budget.requests_over_parent is None for target in self.targets):
            raise ValueError(f"lengths_by: {self.lengths_by} is of requests_over_parent, which no budget has")
        for value in self.sweep or ():
            try:
                self.with_throughput(value)
            except ValueError as error:
                raise ValueError(f"sweep: {error}") from error

    def with_throughput(self, over_parent: float) -> Constraints:
        """Return the constraints with another throughput, relative to the parent's, in the first target.

        Raises:
            ValueError: `over_parent` is not a positive finite number.
        """
        first, *others = self.targets
        budget = dataclasses.replace(
            first.budget, throughput_over_parent=over_parent, throughput_tokens_per_second=None
        )
        return Constraints([dataclasses.replace(first, budget=budget), *others], self.limits, None, self.lengths_by)


@dataclass(frozen=True)
class Costs:
    """How serving costs are predicted.

    Args:
        times: source of kernel times: `lit_puzzle.costs.roofline.Roofline`,
            `lit_puzzle.costs.measured_kernels.MeasuredKernels`, `lit_puzzle.costs.timed_blocks.TimedBlocks` or a class
            of your own.
        engine: settings of the serving engine.
    """

    times: KernelTimes
    engine: ServingEngine = field(default_factory=ServingEngine)


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen.

    Args:
        windows: `free` takes every candidate of the library, `unchanged` those with the parent's attention only.
        uniform_experts: whether all layers keep the same number of experts, so that any runtime loads the child.
        batch_sizes: batch sizes to try where a scenario names none; None tries up to 12 per deployment.

    Raises:
        ValueError: `batch_sizes` is empty or has a number below 1.
    """

    windows: Windows = "free"
    uniform_experts: bool = False
    batch_sizes: list[int] | None = None

    def __post_init__(self) -> None:
        if self.batch_sizes is not None and (not self.batch_sizes or min(self.batch_sizes) < 1):
            raise ValueError(f"batch_sizes must be whole numbers of at least 1, got {list(self.batch_sizes)}")
