"""The content of `plan.json`, and the check of a solved search against the cost model.

The solver adds up coefficients; here the cost model predicts the chosen plan as a whole. Both must agree.

Reads and writes nothing; `lit_puzzle.search.search` writes the file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lit_puzzle.costs.block_cost import Prediction
from lit_puzzle.costs.cost_model import CostModel
from lit_puzzle.costs.serving import Block
from lit_puzzle.library.library import Library
from lit_puzzle.search.answer_lengths import ANSWERS, REQUESTS, product
from lit_puzzle.search.limits import GPU_MEMORY, SERVABLE, required_throughput
from lit_puzzle.search.program import SearchProgram
from lit_puzzle.search.report import SweepPoint
from lit_puzzle.search.solver.choices import DisagreementError, Solution
from lit_puzzle.spec import Budget, Target

SAME_TOTALS = 1e-6  # relative; the two sums differ in order and units only


def check_totals(program: SearchProgram, solution: Solution) -> None:
    """Predict the chosen plan with the cost model and compare it with every sum of the solver.

    Raises:
        DisagreementError: they differ, or the prediction misses a budget.
    """
    blocks, problem, constraints = program.blocks(solution.chosen), program.problem, program.constraints
    _check_servable(program, blocks)
    for position, index in enumerate(solution.options):
        target, model, parent = constraints.targets[position], program.models[position], program.parents[position]
        prediction = model.predict(blocks, *program.deployed[position][index])
        expected = _by_key(prediction, target, parent, blocks)
        lengths, level = program.lengths[position], program.levels[position][index]
        if lengths is not None:
            expected[ANSWERS] = 2 - lengths.ratio(solution.chosen)
        for limit in (*problem.limits, *problem.choices[position][index].limits):
            total = limit.in_user_unit(limit.total(solution.chosen))
            if limit.key == REQUESTS and lengths is not None:
                ratio = lengths.ratio(solution.chosen)
                seconds = product(prediction.latency_seconds, ratio, level, limit.bound)
                expected[REQUESTS] = limit.in_user_unit(seconds)
            if not math.isclose(total, expected[limit.key], rel_tol=SAME_TOTALS):
                raise DisagreementError(
                    f"{limit.name}: the solver counted {total}, the cost model {expected[limit.key]}"
                )
        if lengths is not None:
            expected[REQUESTS] = expected["throughput_over_parent"] / lengths.ratio(solution.chosen)
        _check_budgets(constraints.limits, target, parent, expected)


def _check_servable(program: SearchProgram, blocks: Sequence[Block]) -> None:
    """Check what costs do not show: experts that can be split and routed to, and uniform counts where required."""
    for model in program.models:
        ranks = model.scenario.expert_parallel or 1
        for layer, block in enumerate(blocks):
            if block.num_experts % ranks:
                raise DisagreementError(
                    f"layer {layer} of the plan has {block.num_experts} experts: expert_parallel {ranks} must divide "
                    "them"
                )
    counts = {block.num_experts for block in blocks}
    if program.problem.labels is not None and len(counts) > 1:
        raise DisagreementError(f"uniform_experts is set, but the plan has layers of {sorted(counts)} experts")


def _by_key(
    prediction: Prediction, target: Target, parent: Prediction | None, blocks: Sequence[Block]
) -> dict[str, float]:
    """Return what the cost model predicts for every kind of limit, by its key."""
    speed = prediction.tokens_per_second
    return {
        GPU_MEMORY: prediction.memory_gib / target.scenario.num_gpus,
        SERVABLE: 0.0,
        "memory_gib": prediction.memory_gib,
        "throughput_tokens_per_second": speed,
        "throughput_over_parent": math.nan if parent is None else speed / parent.tokens_per_second,
        REQUESTS: math.nan if parent is None else speed / parent.tokens_per_second,
        "latency_seconds": prediction.latency_seconds,
        "total_parameters": prediction.parameters,
        "active_parameters": prediction.active_parameters,
        "full_attention_layers": sum(block.window_tokens is None for block in blocks),
    }


def _check_budgets(limits: Budget, target: Target, parent: Prediction | None, predicted: dict[str, float]) -> None:
    required = required_throughput(target, parent)
    if required is not None and predicted["throughput_tokens_per_second"] < required[1] * (1 - SAME_TOTALS):
        raise DisagreementError(
            f"the plan misses its budget: {predicted['throughput_tokens_per_second']} tokens a second, "
            f"{required[0]} requires {required[1]}"
        )
    least = target.budget.requests_over_parent
    if least is not None and not predicted[REQUESTS] >= least * (1 - SAME_TOTALS):
        raise DisagreementError(f"the plan misses its budget: {REQUESTS} is {predicted[REQUESTS]}, required is {least}")
    for budget in (limits, target.budget):
        for key, bound in budget.to_json().items():
            if (
                bound is not None
                and not key.startswith(("throughput", "requests"))
                and predicted[key] > bound * (1 + SAME_TOTALS)
            ):
                raise DisagreementError(
                    f"the plan misses its budget: {key} is {predicted[key]}, at most {bound} is allowed"
                )


def plan_record(
    library: Library, program: SearchProgram, solutions: list[Solution], points: list[SweepPoint], run: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of plan.json.

    Args:
        library: the library that was searched.
        program: the program with all deployments and batch sizes that were tried.
        solutions: the best plan, then its alternatives.
        points: the points of a sweep.
        run: name and seconds of the solver.
    """
    best = solutions[0]
    tried = program.num_tried
    names = [[row[index].name for row, index in zip(program.layers, solution.chosen)] for solution in solutions]
    quality_losses = [row[index] for row, index in zip(program.problem.quality_loss, best.chosen)]
    return {
        "plan": library.plan(names[0]).to_json(),
        "quality_loss": best.quality_loss,
        "optimality": {**_proof(best), "deployments_and_batches_tried": tried, **run},
        "predicted": _predicted(program, best),
        "scores": [
            {"layer": layer, "candidate": name, "quality_loss": value}
            for layer, (name, value) in enumerate(zip(names[0], quality_losses))
        ],
        "trained_files": trained_files(library, names[0]),
        "alternatives": [
            {
                "plan": library.plan(chosen).to_json(),
                "quality_loss": solution.quality_loss,
                **_proof(solution),
                "candidates": chosen,
                "predicted": _predicted(program, solution),
            }
            for chosen, solution in zip(names[1:], solutions[1:])
        ],
        "sweep": [dataclasses.asdict(point) for point in points],
    }


def trained_files(library: Library, names: Sequence[str]) -> list[str]:
    """Return the library's files with the trained tensors of the chosen candidates, which assembling needs."""
    chosen = [(layer, library.candidate(layer, name)) for layer, name in enumerate(names)]
    return [str(part.weights) for layer, candidate in chosen for part in library.trained(layer, candidate)]


def _proof(solution: Solution) -> dict[str, Any]:
    """Return what is proven for the deployments and batch sizes tried; None where no bound was found in time."""
    known = solution.bound is not None and math.isfinite(solution.bound)
    return {
        "bound": solution.bound if known else None,
        "gap": solution.gap if known and solution.gap != math.inf else None,
        "proven": solution.proven,
    }


def _predicted(program: SearchProgram, solution: Solution) -> list[dict[str, Any]]:
    blocks, rows = program.blocks(solution.chosen), []
    for position, index in enumerate(solution.options):
        target, model, parent = (
            program.constraints.targets[position],
            program.models[position],
            program.parents[position],
        )
        pairs, lengths = program.deployed[position], program.lengths[position]
        child = _best_within(target, model, blocks, model.predict(blocks, *pairs[index]))
        required = required_throughput(target, parent)
        longer = None if lengths is None else lengths.ratio(solution.chosen)
        speedup = None if parent is None else child.tokens_per_second / parent.tokens_per_second
        rows.append(
            {
                "target": target.to_json(),
                "required_tokens_per_second": None if required is None else required[1],
                "parent": None if parent is None else parent.to_json(),
                "child": child.to_json(),
                "speedup": speedup,
                "answer_length": longer,
                "requests_over_parent": None if longer is None or speedup is None else speedup / longer,
            }
        )
    return rows


def _best_within(target: Target, model: CostModel, blocks: Sequence[Block], chosen: Prediction) -> Prediction:
    """Return the child's best deployment and batch size, or the chosen one where memory or latency are bounded."""
    if target.budget.memory_gib is not None or target.budget.latency_seconds is not None:
        return chosen
    return max(chosen, model.best(blocks), key=lambda prediction: prediction.tokens_per_second)


def results(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers for run.json; targets by their position."""
    optimality = record["optimality"]
    numbers = {
        "quality_loss": record["quality_loss"],
        "proven": float(optimality["proven"]),
        "solver_seconds": optimality["seconds"],
    }
    for name in ("bound", "gap"):
        if optimality[name] is not None:
            numbers[name] = optimality[name]
    for position, row in enumerate(record["predicted"]):
        child = row["child"]
        numbers["parameters"] = float(child["parameters"])
        numbers[f"tokens_per_second/{position}"] = child["tokens_per_second"]
        numbers[f"memory_gib/{position}"] = child["memory_gib"]
        if row["speedup"] is not None:
            numbers[f"speedup/{position}"] = row["speedup"]
        if row["answer_length"] is not None:
            numbers |= {f"{name}/{position}": row[name] for name in ("answer_length", "requests_over_parent")}
    return numbers
