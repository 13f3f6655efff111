"""settings.py and solver/settings.py: what a recipe may set, and what is refused before anything slow."""

import math
from dataclasses import replace

import pytest

from lit_puzzle.search.settings import Constraints, SearchSpace
from lit_puzzle.search.solver.settings import SolverSettings
from lit_puzzle.spec import Budget, Scenario, Target

TARGET = Target(Scenario("H100", 1, 64, 64), Budget(throughput_tokens_per_second=10.0, memory_gib=1.0))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"name": "simplex"}, "unknown solver 'simplex'; allowed: .*'mip'"),
        ({"alpha": 1.0}, "alpha must be"),
        ({"num_solutions": 0}, "num_solutions must be"),
        ({"time_limit_seconds": 0}, "^time_limit_seconds must be positive"),
        ({"sweep_time_limit_seconds": 0}, "^sweep_time_limit_seconds must be positive"),
        ({"relative_gap": 1.0}, "relative_gap must be"),
    ],
)
def test_bad_solver_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        SolverSettings(**bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": []}, "targets is empty"),
        ({"limits": Budget(latency_seconds=1.0)}, r"\['latency_seconds'\] depend on a deployment"),
        ({"limits": Budget(memory_gib=1.0)}, r"\['memory_gib'\] depend on a deployment"),
        ({"sweep": [1.1, 0.0]}, "sweep: Budget: throughput_over_parent must be positive"),
        ({"targets": [replace(TARGET, efforts={"low": 1.0})]}, "are of requests_over_parent, which the budget lacks"),
        ({"targets": [replace(TARGET, efforts={"hgih": 1.0})]}, r"Efforts \['hgih'\] were given; allowed are"),
        ({"lengths_by": "far"}, "lengths_by: far is of requests_over_parent, which no budget has"),
        ({"sweep": [math.nan]}, "sweep: Budget: throughput_over_parent must be a finite number"),
    ],
)
def test_constraints_without_meaning_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Constraints(**({"targets": [TARGET]} | change))


def test_another_throughput_replaces_that_of_the_first_target_only():
    second = replace(TARGET, budget=Budget(throughput_over_parent=1.2))
    constraints = Constraints([TARGET, second], Budget(total_parameters=5), sweep=[1.1])
    faster = constraints.with_throughput(1.5)
    assert faster.targets[0].budget == Budget(throughput_over_parent=1.5, memory_gib=1.0)
    assert faster.targets[1] == second and faster.limits == constraints.limits and faster.sweep is None


@pytest.mark.parametrize("batch_sizes", [[], [0], [4, -1]])
def test_batch_sizes_are_positive(batch_sizes):
    with pytest.raises(ValueError, match="batch_sizes must be whole numbers of at least 1"):
        SearchSpace(batch_sizes=batch_sizes)
