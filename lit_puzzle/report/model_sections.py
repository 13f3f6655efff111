"""Sections of a report about the child itself: its plan, the scores that led to it, and its KV cache.

Reads plan.json, importance.{json,safetensors}, scores.json and config.json of runs; writes nothing. Imports no torch.
"""

from __future__ import annotations

import json
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
from lit_puzzle.run.identity import text_hash
from lit_puzzle.run.inputs import recorded_inputs
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
    picture = Picture.drawn(
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
        return Section(title, missing="No importance is there: lightning run recipes/final_kl.yaml")
    file = runs[0].folder / IMPORTANCE
    try:
        tensors = load_file(file)
        layers = [tensors[f"layers.{layer}"].tolist() for layer in range(len(tensors))]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    meta = read_json(runs[0].folder / "importance.json")
    experts = max(map(len, layers))
    rows = [[scores[expert] if expert < len(scores) else None for scores in layers] for expert in range(experts)]
    text = f"Scores by {meta['method']} over {meta['tokens']:,} tokens; a higher score means a more important expert."
    missing = sum(map(len, meta.get("not_measured", [])))
    if missing:
        text += f" Experts that were not measured (empty), because no token was routed to them: {missing}."
    picture = Picture.drawn("importance", "Importance of every expert of every layer", heat_map(rows, [], "importance"))
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
    layers = 1 + max(layer for layer, _ in scores.entries)
    names = list(dict.fromkeys(name for _, name in scores.entries))
    pictures, tables, text = [], [], []
    for metric, shown in _by_metric(scores, names, found.of("search")).items():
        grid = [[scores.entries.get((layer, name), {}).get(metric) for layer in range(layers)] for name in shown]
        means = [[None if one is None else one.mean for one in row] for row in grid]
        says = f"Quality loss of candidates of every layer, metric {metric}"
        pictures.append(Picture.drawn(f"scores_{metric}", says, heat_map(means, shown, metric)))
        cells = [["" if one is None else f"{one.mean:.3g} ± {one.standard_error:.2g}" for one in row] for row in grid]
        rows = [[str(layer), *(row[layer] for row in cells)] for layer in range(layers)]
        tables.append(Table([f"layer ({metric})", *shown], rows))
        text.append(f"{metric} of {', '.join(shown)}, each alone in the parent.")
    text.append(f"{scores.samples:,} sequences were scored; an empty cell was not measured.")
    return Section(title, [*text, *choice_text(runs)], pictures, tables, sources=runs[:1])


def _by_metric(scores: Scores, names: Sequence[str], searches: Sequence[RunSummary]) -> dict[str, list[str]]:
    """Return metric -> the candidates that the newest search counted in it; windows may have one of their own.

    Raises:
        ValueError: no entry has a metric.
    """
    have = list(dict.fromkeys(name for metrics in scores.entries.values() for name in metrics))
    if not have:
        raise ValueError("scores.json has no entry with a metric.")
    objective = searches[0].config.get("objective") if searches else None
    wanted = objective if isinstance(objective, Mapping) else {}
    metric = next((name for name in (wanted.get("metric"), *PREFERRED) if name in have), have[0])
    of_windows = wanted.get("window_metric")
    found: dict[str, list[str]] = {}
    for name in names:
        own = of_windows if of_windows in have and name.startswith("window=") else metric
        if any(own in metrics for (_, other), metrics in scores.entries.items() if other == name):
            found.setdefault(own, []).append(name)
    return found


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
    picture = Picture.drawn(
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
    recorded = recorded_inputs(run.folder).get("parent")
    if recorded is None:
        raise ValueError(f"{run.folder} has not recorded its parent.")
    moved = run.located(recorded.path)
    folder = require_input(moved if moved.exists() else Path(recorded.path), "parent", CONFIG_FILE)
    config = text_hash(json.dumps(read_json(folder / CONFIG_FILE), sort_keys=True))
    if recorded.content.get("config", config) != config:
        raise ValueError(f"{folder} is not the parent that {run.folder} was made from: its config.json differs.")
    return folder


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
