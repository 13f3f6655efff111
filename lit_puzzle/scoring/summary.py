"""The scores of a run as numbers for its record, and as tables on the terminal.

Reads and writes nothing.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lit_puzzle.scoring.scores import Scores


def summary(scores: Scores) -> dict[str, float]:
    """Return samples, tokens, rows, rows without a score, and the largest quality loss in each metric."""
    results = {"samples": scores.samples, "tokens": scores.tokens, "rows": len(scores.entries)}
    results["not_measured"] = sum(not metrics for metrics in scores.entries.values())
    metrics = {name for entry in scores.entries.values() for name in entry}
    largest = {
        f"{name}/max": max(entry[name].mean for entry in scores.entries.values() if name in entry)
        for name in sorted(metrics)
    }
    return {name: float(value) for name, value in (results | largest).items()}


def print_scores(scores: Scores, metrics: Sequence[str]) -> None:
    """Print some metrics of every row, one line per layer."""
    names = list(dict.fromkeys(name for _, name in scores.entries))
    layers = sorted({layer for layer, _ in scores.entries})
    for metric in metrics:
        table = Table("layer", *names, title=f"{metric} of replacing one block")
        for layer in layers:
            found = [scores.entries.get((layer, name), {}).get(metric) for name in names]
            table.add_row(str(layer), *("" if m is None else f"{m.mean:.4f} ± {m.standard_error:.4f}" for m in found))
        if any(metric in entry for entry in scores.entries.values()):
            Console().print(table)
