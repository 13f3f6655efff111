"""A solved search in the cost model's words: checked against it, and written down as what `plan.json` holds.

The solver worked with sums of coefficients; here the cost model predicts the chosen plan as a whole. Both must agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lit_puzzle.search.cost import Block, CostModel, Prediction
from lit_puzzle.search.library import Library
from lit_puzzle.search.mip import DisagreementError
from lit_puzzle.search.problem import Search, required_throughput
from lit_puzzle.search.search_report import SweepPoint
from lit_puzzle.search.solver.choices import Solution
from lit_puzzle.spec import Budget, Target

SAME_TOTALS = 1e-6  # relative; the two sums differ in order and units only


def check_totals(written: Search, solution: Solution) -> None:
    """Predict the chosen plan with the cost model and compare with the sums that the solver worked with.

    Raises:
        DisagreementError: They differ, or the prediction misses a budget.
    """
    blocks = written.blocks(solution.chosen)
    for target, model, parent, pairs, options, index in zip(
        written.targets,
        written.models,
        written.parents,
        written.deployed,
        written.problem.choices,
        solution.options,
        strict=True,
    ):
        deployment, batch = pairs[index]
        predicted = model.predict(blocks, deployment, batch)
        memory = options[index].limits[0].total(solution.chosen) * target.scenario.num_gpus
        if not math.isclose(memory, predicted.memory_gib, rel_tol=SAME_TOTALS):
            raise DisagreementError(f"the solver counted {memory} GiB, the cost model {predicted.memory_gib} GiB")
        for name, value, bound in _bounds(target.budget, required_throughput(target, parent), predicted):
            if value > bound * (1 + SAME_TOTALS):
                raise DisagreementError(f"the plan misses its budget: {name} is {value}, at most {bound} is allowed")


def _bounds(budget: Budget, throughput: float | None, predicted: Prediction) -> list[tuple[str, float, float]]:
    """What was asked for: (name, predicted, at most)."""
    asked: list[tuple[str, float, float | None]] = [
        ("seconds per token", 1 / predicted.tokens_per_second, 1 / throughput if throughput else None),
        ("memory_gib", predicted.memory_gib, budget.memory_gib),
        ("latency_seconds", predicted.latency_seconds, budget.latency_seconds),
        ("total_parameters", predicted.parameters, budget.total_parameters),
        ("active_parameters", predicted.active_parameters, budget.active_parameters),
    ]
    return [(name, value, bound) for name, value, bound in asked if bound is not None]


def plan_record(
    library: Library, written: Search, solutions: list[Solution], points: list[SweepPoint], how: dict[str, Any]
) -> dict[str, Any]:
    """What plan.json holds."""
    best = solutions[0]
    names = [[row[index].name for row, index in zip(written.layers, solution.chosen)] for solution in solutions]
    damages = [row[index] for row, index in zip(written.problem.damage, best.chosen)]
    return {
        "plan": library.plan(names[0]).to_json(),
        "damage": best.damage,
        "optimality": {"bound": best.bound, "gap": best.gap, "proven": best.proven, **how},
        "predicted": _predicted(written, best),
        "scores": [
            {"layer": layer, "candidate": name, "damage": value}
            for layer, (name, value) in enumerate(zip(names[0], damages))
        ],
        "alternatives": [
            {
                "plan": library.plan(chosen).to_json(),
                "damage": solution.damage,
                "gap": solution.gap,
                "proven": solution.proven,
                "candidates": chosen,
                "predicted": _predicted(written, solution),
            }
            for chosen, solution in zip(names[1:], solutions[1:])
        ],
        "sweep": [dataclasses.asdict(point) for point in points],
    }


def _predicted(written: Search, solution: Solution) -> list[dict[str, Any]]:
    blocks, rows = written.blocks(solution.chosen), []
    for target, model, parent, pairs, index in zip(
        written.targets, written.models, written.parents, written.deployed, solution.options, strict=True
    ):
        child = _best_within(target, model, blocks, model.predict(blocks, *pairs[index]))
        rows.append(
            {
                "target": target.to_json(),
                "required_tokens_per_second": required_throughput(target, parent),
                "parent": None if parent is None else parent.to_json(),
                "child": child.to_json(),
                "speedup": None if parent is None else child.tokens_per_second / parent.tokens_per_second,
            }
        )
    return rows


def _best_within(target: Target, model: CostModel, blocks: Sequence[Block], chosen: Prediction) -> Prediction:
    """The child's best deployment and batch, unless memory or latency are bounded: then the one the search chose."""
    if target.budget.memory_gib is not None or target.budget.latency_seconds is not None:
        return chosen
    return max(chosen, model.best(blocks), key=lambda prediction: prediction.tokens_per_second)


def headline(record: dict[str, Any]) -> dict[str, float]:
    """The numbers for run.json; targets by their position."""
    optimality = record["optimality"]
    results = {
        "damage": record["damage"],
        "proven": float(optimality["proven"]),
        "solver_seconds": optimality["seconds"],
    }
    for name in ("bound", "gap"):
        if optimality[name] is not None:
            results[name] = optimality[name]
    for position, row in enumerate(record["predicted"]):
        child = row["child"]
        results["parameters"] = float(child["parameters"])
        results[f"tokens_per_second/{position}"] = child["tokens_per_second"]
        results[f"memory_gib/{position}"] = child["memory_gib"]
        if row["speedup"] is not None:
            results[f"speedup/{position}"] = row["speedup"]
    return results
