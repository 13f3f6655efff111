"""Loss of a model and of its parent by position in a document.

With edges e_0 < e_1 < ... < e_n, bin i holds the targets with e_i to e_{i+1} - 1 tokens before them. Of each bin

    loss/<bin>              mean of -log q(t), q the model's distribution; loss/<bin>/parent: with the parent's p
    loss/<bin>/difference   mean of log p(t) - log q(t): both on the same tokens, so paired

with standard errors over documents (`mean_over_documents`): tokens of one document are not independent. A bin in which
fewer than two documents have targets gets no entry. Pure functions; reads and writes nothing.

Shapes: N targets.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

SUMS = ("log_loss", "parent_log_loss")


def bin_names(edges: Sequence[int]) -> list[str]:
    """Return the names of the bins, such as `64-255`.

    Raises:
        ValueError: fewer than two edges, or edges that do not grow.
    """
    if len(edges) < 2 or edges[0] < 0 or any(high <= low for low, high in pairwise(edges)):
        raise ValueError(
            f"position_bins is {list(edges)}; two or more growing numbers of tokens are needed, such as [1, 64, 1024]."
        )
    return [f"{low}-{high - 1}" for low, high in pairwise(edges)]


def binned_sums(losses: Mapping[str, Tensor], places_N: Tensor, edges: Sequence[int]) -> dict[str, float]:
    """Return a document's targets and sums of losses in each bin: `targets/<bin>`, `log_loss/<bin>` and so on.

    Args:
        losses: name of `SUMS` -> loss of each target (N).
        places_N: tokens before each target.
        edges: of the bins.
    """
    bins_N = torch.bucketize(places_N, torch.tensor(edges), right=True) - 1  # outside: -1, and len(edges) - 1
    found = {}
    for number, name in enumerate(bin_names(edges)):
        inside_N = bins_N == number
        found[f"targets/{name}"] = float(inside_N.sum())
        found |= {f"{what}/{name}": float(losses[what][inside_N].double().sum()) for what in SUMS}
    return found


def mean_over_documents(sums: Sequence[float], targets: Sequence[float]) -> tuple[float, float]:
    """Return a mean over targets and its standard error over documents (formula: `text_distance`)."""
    total = math.fsum(targets)
    mean = math.fsum(sums) / total
    squares = math.fsum((part - mean * count) ** 2 for part, count in zip(sums, targets, strict=True))
    return mean, math.sqrt(len(sums) / (len(sums) - 1) * squares) / total


def summarize_bins(rows: Sequence[Mapping[str, float]], edges: Sequence[int]) -> dict[str, float]:
    """Return the means of every bin with targets in two documents or more, and their standard errors.

    Args:
        rows: `binned_sums` of each document.
        edges: of the bins.

    Returns:
        `loss/<bin>`, `loss/<bin>/parent` and `loss/<bin>/difference`, each with `_se`.
    """
    results = {}
    for name in bin_names(edges):
        inside = [row for row in rows if row[f"targets/{name}"] > 0]
        if len(inside) < 2:
            continue
        targets = [row[f"targets/{name}"] for row in inside]
        own, parent = ([row[f"{what}/{name}"] for row in inside] for what in SUMS)
        differences = [mine - theirs for mine, theirs in zip(own, parent, strict=True)]
        for key, sums in (("", own), ("/parent", parent), ("/difference", differences)):
            results[f"loss/{name}{key}"], results[f"loss/{name}{key}_se"] = mean_over_documents(sums, targets)
    return results


def print_bins(results: Mapping[str, float], rows: Sequence[Mapping[str, float]], edges: Sequence[int]) -> None:
    """Print the loss by position, and which bins have no entry."""
    table = Table(
        "tokens before", "targets", "documents", "parent", "model", "model - parent", title="Loss by position"
    )
    for name in bin_names(edges):
        targets = [row[f"targets/{name}"] for row in rows]
        cells = [f"{sum(targets):,.0f}", str(sum(count > 0 for count in targets))]
        if f"loss/{name}" in results:
            for key, form in (("/parent", ".4f"), ("", ".4f"), ("/difference", "+.4f")):
                cells.append(f"{results[f'loss/{name}{key}']:{form}} ± {results[f'loss/{name}{key}_se']:.4f}")
        else:
            cells.append("no entry: two documents with targets there are needed")
        table.add_row(name, *cells)
    Console().print(table)
