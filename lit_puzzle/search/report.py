"""What a search found, for people: a table in Markdown, a picture of the plan and the curve of damage against speed.

Writes search.md, plan.png, plan.svg, curve.png and curve.svg into the run folder. Drawing needs matplotlib, which is
imported when the plan is already on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_puzzle.library.library import Library
from lit_puzzle.run.folder import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL, NARROWED, OWN_WINDOW = "#1b6ca8", "#e07b39", "#9db4c0"


@dataclass(frozen=True)
class SweepPoint:
    """One budget of a sweep.

    Attributes:
        throughput_over_parent: The speed asked for.
        damage: Of the best plan; None when none was found.
        proven: That this is the least damage or, without one, that there is no plan.
    """

    throughput_over_parent: float
    quality_loss: float | None
    proven: bool


def write_table(path: Path, record: Mapping[str, Any]) -> None:
    """Write what plan.json holds as Markdown."""
    lines = ["# The plan", "", _proof(record), "", *_targets(record["predicted"]), "", *_layers(record)]
    if record["alternatives"]:
        lines += ["", "## Alternatives", "", "| plan | damage | layers that differ |", "|---|---|---|"]
        own = [row["candidate"] for row in record["scores"]]
        for position, other in enumerate(record["alternatives"], start=1):
            differ = [str(layer) for layer, pair in enumerate(zip(own, other["candidates"])) if pair[0] != pair[1]]
            lines.append(f"| {position} | {other['quality_loss']:.6g} | {', '.join(differ)} |")
    if record["sweep"]:
        lines += ["", "## Damage against speed", "", "| times the parent, first target | damage |", "|---|---|"]
        for point in record["sweep"]:
            lines.append(f"| {point['throughput_over_parent']:g} | {_point(point)} |")
    write_atomically(path, "\n".join(lines) + "\n")


def _proof(record: Mapping[str, Any]) -> str:
    optimality = record["optimality"]
    told = f"Damage {record['quality_loss']:.6g}, found by `{optimality['solver']}` in {optimality['seconds']:.2f} s: "
    if optimality["gap"] is None:
        return told + "nothing is proven."
    tried = " and ".join(str(count) for count in optimality["deployments_and_batches_tried"])
    where = f"for the {tried} deployments and batches tried"
    if optimality["gap"] == 0:
        return told + f"proven {where}, no plan within these budgets does less there."
    return told + f"{where}, no plan does less than {optimality['bound']:.6g} (gap {optimality['gap']:.2%})."


def _point(point: Mapping[str, Any]) -> str:
    if point["quality_loss"] is None:
        return "no plan" if point["proven"] else "none found"
    return f"{point['quality_loss']:.6g}" + ("" if point["proven"] else " (not proven)")


def _targets(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row per target and model; all of it predicted."""
    head = (
        "| target | model | tokens/s | over parent | asked for | GiB | seconds per request | tensor parallel | batch |"
    )
    lines = ["## Predicted", "", head, "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        scenario, required = row["target"]["scenario"], row["required_tokens_per_second"]
        where = (
            f"{scenario['num_gpus']} x {scenario['gpu']}, {scenario['prompt_tokens']}/{scenario['generated_tokens']}"
        )
        for name in ("parent", "child"):
            if row[name] is None:
                lines.append(f"| {where} | {name} | does not fit | | | | | | |")
                continue
            known, is_child = row[name], name == "child"
            over = f"{row['speedup']:.3f}" if is_child and row["speedup"] is not None else ""
            wanted = f"{required:.6g}" if is_child and required is not None else ""
            lines.append(
                f"| {where} | {name} | {known['tokens_per_second']:.6g} | {over} | {wanted} "
                f"| {known['memory_gib']:.4g} | {known['latency_seconds']:.4g} "
                f"| {known['deployment']['tensor_parallel']} | {known['batch_size']} |"
            )
    return lines


def _layers(record: Mapping[str, Any]) -> list[str]:
    lines = ["## Layers", "", "| layer | candidate | experts | window | damage |", "|---|---|---|---|---|"]
    for row, block in zip(record["scores"], record["plan"]["blocks"], strict=True):
        window = "full" if block["window_tokens"] is None else block["window_tokens"]
        lines.append(
            f"| {row['layer']} | {row['candidate']} | {len(block['experts'])} | {window} | {row['quality_loss']:.4g} |"
        )
    return lines


def draw_plan(folder: Path, library: Library, plan: Mapping[str, Any]) -> None:
    """Kept experts of every layer as bars; the color says what became of the attention."""
    figure = _figure(width=max(5.0, 0.28 * library.num_layers))
    axes = figure.subplots()
    colors = {FULL: "full attention", NARROWED: "full attention became a window", OWN_WINDOW: "the parent's window"}
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
    """Damage of the best plan for every speed; a cross where there is no plan, a plus where none was found."""
    figure = _figure(width=5.0)
    axes = figure.subplots()
    found = [(point.throughput_over_parent, point.quality_loss) for point in points if point.quality_loss is not None]
    axes.plot(*zip(*found) if found else ([], []), marker="o", color=FULL, label="least damage found")
    for proven, marker, label in ((True, "x", "no plan"), (False, "+", "none found")):
        missing = [p.throughput_over_parent for p in points if p.quality_loss is None and p.proven is proven]
        if missing:
            axes.plot(missing, [0.0] * len(missing), marker, color=NARROWED, label=label)
    axes.set_xlabel("throughput of the first target, times the parent's")
    axes.set_ylabel("quality loss")
    axes.legend(fontsize=8, frameon=False)
    _save(figure, folder / "curve")


def _figure(width: float) -> Figure:
    from matplotlib.figure import Figure  # no pyplot: a Figure by itself needs no display

    return Figure(figsize=(width, 3.2), layout="constrained")


def _save(figure: Figure, stem: Path) -> None:
    figure.savefig(stem.with_suffix(".png"), dpi=120)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})
