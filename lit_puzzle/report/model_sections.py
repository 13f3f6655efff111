"""Sections of a report about the child itself: its plan, the scores that led to it, and its KV cache.

Reads plan.json, importance.{json,safetensors}, scores.json and config.json of runs; writes nothing. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from lit_puzzle.costs.kv_layout import vllm_demand, window_counts
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.model.layout import layer_blocks, whole
from lit_puzzle.report.figures import bars, heat_map, layer_map
from lit_puzzle.report.found_runs import FoundRuns, choice_text
from lit_puzzle.report.page import Picture, Section, Table
from lit_puzzle.report.results_table import number_text
from lit_puzzle.report.run_summary import RunSummary
from lit_puzzle.run.files import read_json
from lit_puzzle.run.folder import require_input
from lit_puzzle.scoring.scores import SCORES_FILE, Scores
from lit_puzzle.spec import Plan, read_plan

PLAN, CONFIG_FILE = "plan.json", "config.json"
IMPORTANCE = "importance.safetensors"
PREFERRED = ("kl", "hidden_mse", "layer_error")  # metrics, where no search says which counted
BLOCK_TOKENS = 16  # of vLLM's KV cache
BF16_BYTES = 2
SHARES = (64, 16, 4, 1)  # of the longest context


def plan_section(found: FoundRuns) -> Section:
    """Return the section with the plan of the newest search, or of the newest child."""
    title, searches = "Plan", found.of("search")
    runs = searches or found.having(f"child/{PLAN}")
    if not runs:
        return Section(title, missing="No search and no child is there: lightning run recipes/search.yaml")
    run = runs[0]
    plan, record = read_plan(run.folder / PLAN if searches else run.folder / "child" / PLAN)
    kept = [block.experts for block in plan.blocks]
    windows = [block.window_tokens for block in plan.blocks]
    count, total = sum(map(len, kept)), plan.num_parent_experts * len(kept)
    full = sum(window is None for window in windows)
    text = f"{count:,} of {total:,} experts are kept ({count / total:.0%}); {full} of {len(kept)} layers attend fully."
    picture = Picture(
        "plan", "Experts that each layer keeps, colored by attention", layer_map(kept, plan.num_parent_experts, windows)
    )
    lines = [text, *_search_text(record), *choice_text(runs)]
    return Section(title, lines, [picture], [_layers(plan, record)], sources=[run])


def _search_text(record: Mapping[str, Any]) -> list[str]:
    """Return what the search says of its plan."""
    if not record:
        return []
    gap = record["optimality"]["gap"]
    proof = (
        "not proven to be the lowest" if gap is None else "proven to be the lowest" if gap == 0 else f"gap {gap:.2%}"
    )
    loss = f"Quality loss {record['quality_loss']:.4g}, {proof} for the deployments and batch sizes tried."
    return [loss, *record.get("limits_of_evidence", [])]


def _layers(plan: Plan, record: Mapping[str, Any]) -> Table:
    losses = [number_text(row["quality_loss"]) for row in record["scores"]] if record else []
    rows = [
        [
            str(layer),
            f"{block.num_experts} of {plan.num_parent_experts}",
            "full" if block.window_tokens is None else f"{block.window_tokens:,}",
            *losses[layer : layer + 1],
        ]
        for layer, block in enumerate(plan.blocks)
    ]
    return Table(["layer", "experts", "window", *(["quality loss"] if losses else [])], rows)


def importance_section(found: FoundRuns) -> Section:
    """Return the section with the heat map of expert importance.

    Raises:
        ValueError: the file is damaged.
    """
    title, runs = "Expert importance", found.having(IMPORTANCE)
    if not runs:
        return Section(title, missing="No importance is there: lightning run recipes/importance.yaml")
    file = runs[0].folder / IMPORTANCE
    try:
        tensors = load_file(file)
        layers = [tensors[f"layers.{layer}"].tolist() for layer in range(len(tensors))]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    method = read_json(runs[0].folder / "importance.json")
    experts = max(map(len, layers))
    rows = [[scores[expert] if expert < len(scores) else None for scores in layers] for expert in range(experts)]
    text = (
        f"Scores by {method['method']} over {method['tokens']:,} tokens; a higher score means a more important expert."
    )
    picture = Picture("importance", "Importance of every expert of every layer", heat_map(rows, [], "importance"))
    return Section(title, [text, *choice_text(runs)], [picture], sources=runs[:1])


def scores_section(found: FoundRuns) -> Section:
    """Return the section with the replace-1-block scores in the metric that the search counted.

    Raises:
        ValueError: the file is damaged.
    """
    title, runs = "Replace-1-block scores", found.having(SCORES_FILE)
    if not runs:
        return Section(title, missing="No scores are there: lightning run recipes/score.yaml")
    scores = Scores.load(runs[0].folder)
    metric = _metric(scores, found.of("search"))
    layers = 1 + max(layer for layer, _ in scores.entries)
    names = list(dict.fromkeys(name for _, name in scores.entries))

    def mean(layer: int, name: str) -> float | None:
        measured = scores.entries.get((layer, name), {}).get(metric)
        return None if measured is None else measured.mean

    def cell(layer: int, name: str) -> str:
        measured = scores.entries.get((layer, name), {}).get(metric)
        return "" if measured is None else f"{measured.mean:.3g} ± {measured.standard_error:.2g}"

    rows = [[mean(layer, name) for layer in range(layers)] for name in names]
    shown = [(name, row) for name, row in zip(names, rows, strict=True) if any(value is not None for value in row)]
    picture = Picture(
        "scores",
        f"Quality loss of every candidate of every layer, metric {metric}",
        heat_map([row for _, row in shown], [name for name, _ in shown], metric),
    )
    table = Table(
        ["layer", *(name for name, _ in shown)],
        [[str(layer), *(cell(layer, name) for name, _ in shown)] for layer in range(layers)],
    )
    text = f"{metric} of each block alone in the parent, over {scores.samples:,} sequences; empty: not measured."
    return Section(title, [text, *choice_text(runs)], [picture], [table], sources=runs[:1])


def _metric(scores: Scores, searches: Sequence[RunSummary]) -> str:
    """Return the metric that the newest search counted, if it was measured."""
    have = list(dict.fromkeys(name for metrics in scores.entries.values() for name in metrics))
    objective = searches[0].config.get("objective", {}) if searches else {}
    wanted = [objective.get("metric")] if isinstance(objective, Mapping) else []
    found = next((name for name in (*wanted, *PREFERRED) if name in have), None)
    if found is None and not have:
        raise ValueError("scores.json has no entry with a metric.")
    return found or have[0]


def kv_section(found: FoundRuns) -> Section:
    """Return the section with the bytes of KV cache of one request, of parent and child."""
    title = "KV cache"
    runs = [run for run in found.of("assemble") if (run.folder / "child" / CONFIG_FILE).is_file()]
    if not runs:
        return Section(title, missing="No assembled child is there: lightning run recipes/assemble.yaml")
    run = runs[0]
    parent = read_json(_parent_of(run) / CONFIG_FILE)
    child = read_json(run.folder / "child" / CONFIG_FILE)
    longest = whole(child, "max_position_embeddings")
    lengths = sorted({max(BLOCK_TOKENS, longest // share) for share in SHARES})
    values = {
        "parent": [_allocated(parent, tokens) for tokens in lengths],
        "child, as vLLM allocates": [_allocated(child, tokens) for tokens in lengths],
        "child, bytes of its tokens": [_ideal(child, tokens) for tokens in lengths],
    }
    rows = [
        [f"{tokens:,}", *(f"{kind[place] / 2**20:.4g}" for kind in values.values()), f"{kind_ratio:.2f}"]
        for place, tokens in enumerate(lengths)
        for kind_ratio in [values["parent"][place] / values["child, as vLLM allocates"][place]]
    ]
    text = (
        "MiB of one request in bfloat16, computed from both configurations; FP8 takes half. vLLM puts layers of one "
        "attention type into groups of equal width and pads them, so that a plan may save less than its bytes say."
    )
    picture = Picture(
        "kv_cache",
        "KV cache of one request at several lengths, parent and child",
        bars(
            [f"{tokens:,} tokens" for tokens in lengths],
            {k: [v / 2**20 for v in row] for k, row in values.items()},
            "MiB",
        ),
    )
    table = Table(["tokens", *values, "parent / child"], rows)
    return Section(title, [text, *choice_text(runs)], [picture], [table], sources=[run])


def _parent_of(run: RunSummary) -> Path:
    """Return the parent's folder as the run recorded it, also after the folders have moved together."""
    recorded = (run.record or {}).get("inputs", {}).get("parent", {}).get("path")
    if recorded is None:
        raise ValueError(f"{run.folder} has not recorded its parent.")
    moved = run.located(recorded)
    return require_input(moved if moved.exists() else Path(recorded), "parent", CONFIG_FILE)


def _token_bytes(config: Mapping[str, Any]) -> int:
    shape = ModelShape.from_config(config)
    return 2 * shape.num_kv_heads * shape.head_dim * BF16_BYTES


def _allocated(config: Mapping[str, Any], tokens: int) -> float:
    """Return the bytes that vLLM gives a request with so many cached tokens."""
    counts = window_counts(window for _, window in layer_blocks(config))
    return vllm_demand(counts, (tokens - 1, 1), _token_bytes(config), BLOCK_TOKENS, 0).request_bytes


def _ideal(config: Mapping[str, Any], tokens: int) -> float:
    """Return the bytes of the tokens that each layer can see."""
    seen = sum(tokens if window is None else min(tokens, window) for _, window in layer_blocks(config))
    return float(seen * _token_bytes(config))
