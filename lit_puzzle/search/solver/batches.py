"""Which batch sizes a search tries: a coarse ladder first, then finer ones around the batches that it chose.

The best batch lies between the parent's memory-limited one and that of the smallest plan. A search over 12 of them
chooses one; the next tries a few on either side up to its neighbors, and so on while that finds a better plan. What
is proven is proven for the batches tried.

Source: arXiv 2411.19146 solves again for each batch size.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_puzzle.costs.cost_model import Deployment

LADDER = 12
SIDE = 4  # batches from a chosen one to its neighbor, both included
Pairs = Sequence[tuple[Deployment, int]]


def ladder(lowest: int, highest: int, most: int = LADDER) -> list[int]:
    """At most `most` whole numbers from `lowest` to `highest`, both included, geometric; [] when highest is 0."""
    if highest < 1:
        return []
    if highest - lowest < most:
        return list(range(lowest, highest + 1))
    return sorted({round(lowest * (highest / lowest) ** (step / (most - 1))) for step in range(most)})


def finer(tried: Sequence[Pairs], chosen: Sequence[int]) -> list[Pairs] | None:
    """Batches between the neighbors of those chosen, in the chosen deployments; the chosen one is among them.

    Args:
        tried: Deployments and batches of every target.
        chosen: The one taken, by position.

    Returns:
        What to try next; None when nothing new is left.
    """
    found: list[Pairs] = []
    for pairs, index in zip(tried, chosen, strict=True):
        deployment, batch = pairs[index]
        sizes = [size for other, size in pairs if other == deployment]
        lower = max((size for size in sizes if size < batch), default=batch)
        upper = min((size for size in sizes if size > batch), default=batch)
        between = sorted({*ladder(lower, batch, SIDE), *ladder(batch, upper, SIDE)})
        found.append([(deployment, size) for size in between])
    new = any(set(after) - set(before) for before, after in zip(tried, found))
    return found if new else None
