r"""Draw the README's picture: the plan of a child, and accuracy against speed of its parent and of the child.

    python scripts/front_picture.py --search runs/search --parent runs/evaluate_parent \
      --child "after distillation=runs/evaluate_distilled" --child "after RL recovery=runs/evaluate_recovered"

Reads `plan.json` of a search and `run.json` of evaluations (recipes/evaluate.yaml, the same problems for all). Writes
docs/assets/front.png, or --out.

    relative request rate = (token throughput / mean generated tokens) / (the same of the parent at high effort)

Token throughputs are those that the cost model predicts in the search's first target, or, with --speedup, the parent's
times a speed-up that was measured; the picture says which. Source: arXiv 2602.11937 (accuracy-speed frontier).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

MARKERS = {"low": "v", "medium": "s", "high": "^"}
ROOT = Path(__file__).parent.parent
FULL, OUTLINE, PARENT = "#1b6ca8", "#bbbbbb", "#555555"
WINDOWS = ("#9db4c0", "#e07b39", "#b5a642", "#7b4b94")  # by size, smallest first; the last for all larger ones
CHILDREN = ("#e07b39", "#1b6ca8", "#7b4b94")


@dataclass(frozen=True)
class Point:
    """One model at one effort.

    Attributes:
        effort: Low, medium or high.
        accuracy: Share of right answers.
        error: Its standard error.
        tokens: Mean generated tokens.
    """

    effort: str
    accuracy: float
    error: float
    tokens: float


def read_points(folder: Path) -> list[Point]:
    """Return the efforts of a finished evaluation, low to high.

    Raises:
        ValueError: The folder has no finished evaluation.
    """
    file = folder / "run.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no run.json; make it with: lightning run recipes/evaluate.yaml")
    results = json.loads(file.read_text())["results"]
    return [
        Point(effort, *(results[f"{key}/{effort}"] for key in ("accuracy", "accuracy_se", "tokens")))
        for effort in MARKERS
        if f"accuracy/{effort}" in results
    ]


def relative_rates(points: Sequence[Point], speed: float, parent: Sequence[Point]) -> list[float]:
    """Return the request rate of each point over the parent's at its highest effort.

    Args:
        points: One model at its efforts.
        speed: Its token throughput, in multiples of the parent's.
        parent: The parent at its efforts, low to high.
    """
    return [speed * parent[-1].tokens / point.tokens for point in points]


def draw_plan(axes: Axes, plan: Mapping[str, Any]) -> None:
    """Draw the experts that each layer keeps, on the outline of the parent's, colored by attention."""
    blocks = plan["blocks"]
    sizes = sorted({block["window_tokens"] for block in blocks if block["window_tokens"] is not None})
    colors = {None: FULL} | {size: WINDOWS[min(rank, len(WINDOWS) - 1)] for rank, size in enumerate(sizes)}
    axes.bar(range(len(blocks)), plan["num_parent_experts"], color="none", edgecolor=OUTLINE, linewidth=0.9)
    for window, color in colors.items():
        layers = [layer for layer, block in enumerate(blocks) if block["window_tokens"] == window]
        label = "full attention" if window is None else f"window of {window} tokens"
        axes.bar(layers, [len(blocks[layer]["experts"]) for layer in layers], color=color, label=label)
    axes.set(title="Plan: experts kept and attention per layer", xlabel="layer", ylabel="experts")
    axes.set_yticks(range(0, plan["num_parent_experts"] + 1, max(1, plan["num_parent_experts"] // 4)))
    axes.set_ylim(0, 1.45 * plan["num_parent_experts"])
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)


def draw_frontier(axes: Axes, models: Mapping[str, tuple[Sequence[Point], float]], how: str) -> None:
    """Draw accuracy against relative request rate, one line per model, the parent first."""
    parent, _ = next(iter(models.values()))
    for (label, (points, speed)), color in zip(models.items(), (PARENT, *CHILDREN), strict=False):
        rates = relative_rates(points, speed, parent)
        accuracies, errors = [point.accuracy for point in points], [point.error for point in points]
        axes.plot(rates, accuracies, color=color, linewidth=1.3, label=label)
        axes.errorbar(rates, accuracies, yerr=errors, fmt="none", capsize=2, color=color, linewidth=0.9)
        for rate, point in zip(rates, points, strict=True):
            axes.plot(rate, point.accuracy, marker=MARKERS[point.effort], markersize=7, color=color)
    for effort, marker in MARKERS.items():
        axes.plot([], [], marker=marker, linestyle="none", color=OUTLINE, label=f"{effort} effort")
    axes.set_xscale("log")
    axes.set_xticks([1, 1.5, 2, 3, 4, 5], labels=["1", "1.5", "2", "3", "4", "5"], minor=False)
    axes.minorticks_off()
    axes.set(title="Accuracy against speed, at three efforts", ylabel="accuracy on held-out problems")
    axes.set_xlabel(f"requests per second, relative to the parent at high effort\n({how})", fontsize=8)
    axes.legend(fontsize=8, frameon=False, loc="best")


def draw(search: Mapping[str, Any], evaluations: Mapping[str, Sequence[Point]], speedup: float | None) -> Figure:
    """Return the picture.

    Args:
        search: What plan.json of a search holds.
        evaluations: The points of each model by its label, the parent's first.
        speedup: Measured token throughput of the child over the parent's; None: the search's prediction.

    Raises:
        ValueError: The search predicts no speed-up over the parent.
    """
    predicted = search["predicted"][0]
    if speedup is None and predicted["speedup"] is None:
        raise ValueError("the parent does not fit the search's first target; give a measured --speedup")
    scenario = predicted["target"]["scenario"]
    lengths = f"{scenario['prompt_tokens']} prompt + {scenario['generated_tokens']} generated tokens"
    speed = float(predicted["speedup"] if speedup is None else speedup)
    how = f"{speed:.2f}x token throughput of the child: {'predicted, ' + lengths if speedup is None else 'measured'}"
    models = {label: (points, speed if rank else 1.0) for rank, (label, points) in enumerate(evaluations.items())}
    figure = Figure(figsize=(10.5, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    draw_plan(left, search["plan"])
    draw_frontier(right, models, how)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    return figure


def main() -> None:
    """Draw the picture of the run folders named on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--search", type=Path, required=True, help="run folder of recipes/search.yaml")
    parser.add_argument("--parent", type=Path, required=True, help="its evaluation")
    parser.add_argument("--child", action="append", required=True, metavar="LABEL=FOLDER", help="an evaluation")
    parser.add_argument("--speedup", type=float, help="measured token throughput of the child over the parent's")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets" / "front.png")
    arguments = parser.parse_args()
    children = {label: Path(folder) for label, _, folder in (given.partition("=") for given in arguments.child)}
    evaluations = {label: read_points(folder) for label, folder in {"parent": arguments.parent, **children}.items()}
    search = json.loads((arguments.search / "plan.json").read_text())
    draw(search, evaluations, arguments.speedup).savefig(arguments.out, dpi=130, metadata={"Software": None})
    print(arguments.out)


if __name__ == "__main__":
    main()
