"""Which batch sizes a search tries: a coarse ladder first, then finer ones around the batch sizes that it chose.

The best batch size lies between the largest that fits with the parent and the largest that fits with the smallest plan.
A search over 12 of them chooses one; the next search tries a few on either side up to its neighbors, and so on while
that finds a better plan. A proven optimum is proven for the batch sizes tried.

Reads and writes nothing.

Source: arXiv 2411.19146 solves again for each batch size.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_puzzle.costs.serving import Deployment

LADDER = 12
SIDE = 4  # batch sizes from a chosen one to its neighbor, both included

DeployedBatch = tuple[Deployment, int]  # a deployment and its batch size


def ladder(lowest: int, highest: int, most: int = LADDER) -> list[int]:
    """Return at most `most` whole numbers in geometric steps from `lowest` to `highest`; [] when highest is 0."""
    if highest < 1:
        return []
    if highest - lowest < most:
        return list(range(lowest, highest + 1))
    return sorted({round(lowest * (highest / lowest) ** (step / (most - 1))) for step in range(most)})


def finer(tried: Sequence[Sequence[DeployedBatch]], chosen: Sequence[int]) -> list[list[DeployedBatch]] | None:
    """Return the batch sizes around the chosen ones, up to their neighbors, in the chosen deployments.

    Args:
        tried: deployments and batch sizes of every target.
        chosen: index of the chosen one of every target.

    Returns:
        Deployments and batch sizes to try next, the chosen ones included; None when none of them is new.
    """
    found: list[list[DeployedBatch]] = []
    for deployed, index in zip(tried, chosen, strict=True):
        deployment, batch = deployed[index]
        sizes = [size for other, size in deployed if other == deployment]
        lower = max((size for size in sizes if size < batch), default=batch)
        upper = min((size for size in sizes if size > batch), default=batch)
        between = sorted({*ladder(lower, batch, SIDE), *ladder(batch, upper, SIDE)})
        found.append([(deployment, size) for size in between])
    new = any(set(after) - set(before) for before, after in zip(tried, found))
    return found if new else None
