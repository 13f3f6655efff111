"""The report of a search: a table in Markdown, a picture of the plan, and the curve of quality loss against speed.

Writes search.md, plan.png, plan.svg, curve.png and curve.svg into the run folder. Drawing needs matplotlib, which is
imported only then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_puzzle.library.library import Library
from lit_puzzle.run.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL, NARROWED, OWN_WINDOW = "#1b6ca8", "#e07b39", "#9db4c0"


@dataclass(frozen=True)
class SweepPoint:
    """One budget of a sweep.

    Attributes:
        throughput_over_parent: required throughput of the first target, relative to the parent's.
        quality_loss: quality loss of the best plan; None when no plan was found.
        proven: whether this is proven to be the lowest quality loss or, without a plan, that there is none.
    """

    throughput_over_parent: float
    quality_loss: float | None
    proven: bool


def write_table(path: Path, record: Mapping[str, Any]) -> None:
    """Write the content of plan.json as Markdown."""
    notes = [f"- {words}" for words in record.get("limits_of_evidence", [])]
    lines = ["# The plan", "", _proof(record), "", *([*notes, ""] if notes else []), *_targets(record["predicted"])]
    lines += ["", *_layers(record)]
    if record["alternatives"]:
        lines += ["", "## Alternatives", "", "| plan | quality loss | layers that differ |", "|---|---|---|"]
        best = [row["candidate"] for row in record["scores"]]
        for position, other in enumerate(record["alternatives"], start=1):
            differ = [str(layer) for layer, pair in enumerate(zip(best, other["candidates"])) if pair[0] != pair[1]]
            lines.append(f"| {position} | {other['quality_loss']:.6g} | {', '.join(differ)} |")
    if record["sweep"]:
        lines += [
            "",
            "## Quality loss against speed",
            "",
            "| speed-up of the first target | quality loss |",
            "|---|---|",
        ]
        for point in record["sweep"]:
            lines.append(f"| {point['throughput_over_parent']:g} | {_point(point)} |")
    write_atomically(path, "\n".join(lines) + "\n")


def _proof(record: Mapping[str, Any]) -> str:
    optimality = record["optimality"]
    solver = f"found by `{optimality['solver']}` in {optimality['seconds']:.2f} s"
    found = f"The plan has a quality loss of {record['quality_loss']:.6g}, {solver}."
    if optimality["gap"] is None:
        return f"{found} It is not proven to be optimal."
    tried = " and ".join(str(count) for count in optimality["deployments_and_batches_tried"])
    where = f"for all deployments and batch sizes tried ({tried})"
    if optimality["gap"] == 0:
        return f"{found} It is proven to be optimal {where}."
    return f"{found} The lower bound is {optimality['bound']:.6g} {where}, the gap {optimality['gap']:.2%}."


def _point(point: Mapping[str, Any]) -> str:
    if point["quality_loss"] is None:
        return "no plan exists" if point["proven"] else "no plan found"
    return f"{point['quality_loss']:.6g}" + ("" if point["proven"] else " (not proven)")


def _targets(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of predictions: one row per target and model."""
    head = "| target | model | tokens/s | speed-up | required | GiB | seconds per request | tensor parallel | batch |"
    lines = ["## Predictions", "", head, "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        scenario, required = row["target"]["scenario"], row["required_tokens_per_second"]
        where = (
            f"{scenario['num_gpus']} x {scenario['gpu']}, {scenario['prompt_tokens']}/{scenario['generated_tokens']}"
        )
        for name in ("parent", "child"):
            if row[name] is None:
                lines.append(f"| {where} | {name} | does not fit | | | | | | |")
                continue
            predicted, is_child = row[name], name == "child"
            speedup = f"{row['speedup']:.3f}" if is_child and row["speedup"] is not None else ""
            needed = f"{required:.6g}" if is_child and required is not None else ""
            lines.append(
                f"| {where} | {name} | {predicted['tokens_per_second']:.6g} | {speedup} | {needed} "
                f"| {predicted['memory_gib']:.4g} | {predicted['latency_seconds']:.4g} "
                f"| {predicted['deployment']['tensor_parallel']} | {predicted['batch_size']} |"
            )
    for position, row in enumerate(rows, start=1):
        if row.get("answer_length") is not None:
            lines += ["", f"Target {position}: answers {row['answer_length']:.3f} times as long as the parent's, so "
                      f"{row['requests_over_parent']:.3f} times its requests a second."]  # fmt: skip
    return lines


def _layers(record: Mapping[str, Any]) -> list[str]:
    lines = ["## Layers", "", "| layer | candidate | experts | window | quality loss |", "|---|---|---|---|---|"]
    for row, block in zip(record["scores"], record["plan"]["blocks"], strict=True):
        window = "full" if block["window_tokens"] is None else block["window_tokens"]
        lines.append(
            f"| {row['layer']} | {row['candidate']} | {len(block['experts'])} | {window} | {row['quality_loss']:.4g} |"
        )
    return lines


def draw_plan(folder: Path, library: Library, plan: Mapping[str, Any]) -> None:
    """Draw the kept experts of every layer as bars, colored by the attention of the layer."""
    figure = _figure(width=max(5.0, 0.28 * library.num_layers))
    axes = figure.subplots()
    colors = {
        FULL: "full attention",
        NARROWED: "full attention replaced by a window",
        OWN_WINDOW: "the parent's window",
    }
    named: set[str] = set()
    for layer, (block, row) in enumerate(zip(plan["blocks"], library.layers, strict=True)):
        own, now = row[0].block, block["window_tokens"]
        color = FULL if now is None else OWN_WINDOW if now == own.window_tokens else NARROWED
        label = None if color in named else colors[color]
        named.add(color)
        axes.bar(layer, own.num_experts, color="none", edgecolor="#cccccc", linewidth=0.8)
        axes.bar(layer, len(block["experts"]), color=color, label=label)
        if color == NARROWED:
            axes.annotate(f"{now}", (layer, len(block["experts"])), rotation=90, ha="center", va="bottom", fontsize=7)
    axes.set_xlabel("layer")
    axes.set_ylabel("experts kept")
    axes.set_ylim(0, 1.15 * library.num_parent_experts)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    _save(figure, folder / "plan")


def draw_curve(folder: Path, points: Sequence[SweepPoint]) -> None:
    """Draw the lowest quality loss for every speed; a cross where no plan exists, a plus where none was found."""
    figure = _figure(width=5.0)
    axes = figure.subplots()
    found = [(point.throughput_over_parent, point.quality_loss) for point in points if point.quality_loss is not None]
    axes.plot(*zip(*found) if found else ([], []), marker="o", color=FULL, label="lowest quality loss found")
    for proven, marker, label in ((True, "x", "no plan exists"), (False, "+", "no plan found")):
        missing = [p.throughput_over_parent for p in points if p.quality_loss is None and p.proven is proven]
        if missing:
            axes.plot(missing, [0.0] * len(missing), marker, color=NARROWED, label=label)
    axes.set_xlabel("throughput of the first target relative to the parent")
    axes.set_ylabel("quality loss")
    axes.legend(fontsize=8, frameon=False)
    _save(figure, folder / "curve")


def _figure(width: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot no display is needed

    return Figure(figsize=(width, 3.2), layout="constrained")


def _save(figure: Figure, stem: Path) -> None:
    figure.savefig(stem.with_suffix(".png"), dpi=120)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
