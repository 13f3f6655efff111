"""The accuracy-speed frontier as a curve: the best accuracy at every mean cost of a request, and two of them compared.

A setting is one model at one effort; the cost of a request is c = 1 / (relative request rate). An operator who sends a
share s of the requests at one setting and the rest at another pays s c1 + (1 - s) c2 per request and gets the accuracy
s a1 + (1 - s) a2: whatever lies on a straight line between two settings can be had. The frontier is the upper concave
envelope of the settings in the plane of cost and accuracy, and level behind the most accurate one.

Pure functions; reads and writes nothing; imports no torch.
Source: arXiv 2602.11937 (accuracy-speed frontier, a point per effort); the envelope is the plain consequence above.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Point:
    """A setting in the plane of the frontier.

    Attributes:
        cost: 1 / relative request rate.
        accuracy: of the suite.
        effort: of the setting.
    """

    cost: float
    accuracy: float
    effort: str


def frontier(settings: Sequence[Point]) -> list[Point]:
    """Return the vertices of the upper concave envelope, cheapest first, up to the most accurate setting."""
    vertices: list[Point] = []
    for point in sorted(settings, key=lambda point: (point.cost, -point.accuracy)):
        if vertices and point.accuracy <= vertices[-1].accuracy:
            continue
        while len(vertices) > 1 and _slope(vertices[-2], vertices[-1]) <= _slope(vertices[-1], point):
            vertices.pop()
        vertices.append(point)
    return vertices


def _slope(left: Point, right: Point) -> float:
    return (right.accuracy - left.accuracy) / (right.cost - left.cost)


def accuracy_at(vertices: Sequence[Point], cost: float) -> float | None:
    """Return the best accuracy that requests of this mean cost can have; None: the cheapest setting costs more."""
    if cost < vertices[0].cost:
        return None
    for left, right in pairwise(vertices):
        if cost < right.cost:
            return left.accuracy + _slope(left, right) * (cost - left.cost)
    return vertices[-1].accuracy


def cost_at(vertices: Sequence[Point], accuracy: float) -> float | None:
    """Return the least mean cost of requests with at least this accuracy; None: no setting is as accurate."""
    if accuracy <= vertices[0].accuracy:
        return vertices[0].cost
    for left, right in pairwise(vertices):
        if accuracy <= right.accuracy:
            return left.cost + (accuracy - left.accuracy) / _slope(left, right)
    return None


@dataclass(frozen=True)
class Gap:
    """A stretch of costs on which the child's frontier lies below the parent's.

    Attributes:
        cheapest: its least cost.
        dearest: its largest cost; infinite: it never ends.
        worst: largest distance of the frontiers there, in units of accuracy; infinite where the child has no setting
            as cheap and the parent has.
    """

    cheapest: float
    dearest: float
    worst: float


def gaps(parent: Sequence[Point], child: Sequence[Point]) -> list[Gap]:
    """Return where the child's frontier lies below the parent's; none: it lies on or above it everywhere.

    Both are straight between their vertices, so it is enough to look there and where they cross.

    Args:
        parent: vertices of the parent's frontier.
        child: those of the child's.
    """
    found = []
    if parent[0].cost < child[0].cost:
        found.append(Gap(parent[0].cost, child[0].cost, math.inf))
    start = max(parent[0].cost, child[0].cost)
    costs = [start, *sorted({point.cost for point in (*parent, *child) if point.cost > start})]
    behind = [_distance(parent, child, cost) for cost in costs]
    for (left, right), (at_left, at_right) in zip(pairwise(costs), pairwise(behind), strict=True):
        if max(at_left, at_right) > 0:
            crossing = left + (right - left) * at_left / (at_left - at_right) if at_left * at_right < 0 else None
            cheapest = crossing if crossing is not None and at_left < 0 else left
            dearest = crossing if crossing is not None and at_right < 0 else right
            found.append(Gap(cheapest, dearest, max(at_left, at_right)))
    if behind[-1] > 0:
        found.append(Gap(costs[-1], math.inf, behind[-1]))
    return _joined(found)


def _distance(parent: Sequence[Point], child: Sequence[Point], cost: float) -> float:
    above, below = accuracy_at(parent, cost), accuracy_at(child, cost)
    assert above is not None and below is not None
    return above - below


def _joined(found: Sequence[Gap]) -> list[Gap]:
    """Join stretches that touch; one where the child has no setting stays apart."""
    joined: list[Gap] = []
    for gap in found:
        last = joined[-1] if joined else None
        if last is not None and last.dearest == gap.cheapest and math.isfinite(last.worst):
            joined[-1] = Gap(last.cheapest, gap.dearest, max(last.worst, gap.worst))
        else:
            joined.append(gap)
    return joined


def verdict(parent: Sequence[Point], child: Sequence[Point], unit: str = "") -> str:
    """Return one sentence: whether the child's frontier lies on or above the parent's everywhere, and where not.

    Args:
        parent: vertices of the parent's frontier.
        child: those of the child's.
        unit: of accuracy, printed behind a number.
    """
    below = gaps(parent, child)
    if not below:
        return "The child's frontier lies on or above the parent's at every request rate."
    parts = []
    for gap in below:
        if math.isinf(gap.worst):
            parts.append(
                f"has no setting as fast as {1 / gap.cheapest:.3g} (its fastest: {1 / gap.dearest:.3g}; relative rates)"
            )
        else:
            slow = f"from {1 / gap.dearest:.3g} " if math.isfinite(gap.dearest) else ""
            parts.append(
                f"lies up to {gap.worst:.3g}{unit} below at relative request rates {slow}up to {1 / gap.cheapest:.3g}"
            )
    return f"The child's frontier does not lie on or above the parent's everywhere: it {', and '.join(parts)}."
