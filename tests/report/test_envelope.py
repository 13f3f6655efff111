"""The frontier against brute force over mixtures of settings; crossings by hand; the sentence."""

import math
import random

import pytest

from lit_puzzle.report.envelope import Gap, Point, accuracy_at, cost_at, frontier, gaps, verdict


def drawn(seed: int, count: int = 4) -> list[Point]:
    draw = random.Random(seed)
    return [Point(draw.uniform(0.1, 3), draw.uniform(0, 1), str(index)) for index in range(count)]


@pytest.mark.parametrize("seed", range(40))
def test_no_mixture_of_settings_beats_the_frontier(seed: int) -> None:
    settings = drawn(seed)
    vertices = frontier(settings)
    shares = [share / 200 for share in range(201)]
    mixtures = [
        (a.cost * s + b.cost * (1 - s), a.accuracy * s + b.accuracy * (1 - s))
        for a in settings
        for b in settings
        for s in shares
    ]
    for cost in (0.5, 1.0, 1.7, 2.5, 5.0):
        best = max((accuracy for mean, accuracy in mixtures if mean <= cost), default=None)
        found = accuracy_at(vertices, cost)
        if best is None:
            assert found is None
        else:
            assert found is not None and best - 1e-12 <= found <= best + 0.05
    for accuracy in (0.2, 0.5, 0.9):
        least = min((mean for mean, reached in mixtures if reached >= accuracy), default=None)
        found = cost_at(vertices, accuracy)
        if least is None:
            assert found is None
        else:
            assert found is not None and least - 0.05 <= found <= least + 1e-12


@pytest.mark.parametrize("seed", range(40))
def test_gaps_against_a_fine_grid_of_costs(seed: int) -> None:
    parent, child = frontier(drawn(seed)), frontier(drawn(seed + 1000))
    found = gaps(parent, child)
    for step in range(1, 400):
        cost = step / 100
        above, below = accuracy_at(parent, cost), accuracy_at(child, cost)
        behind = above is not None and (below is None or above > below + 1e-9)
        inside = any(gap.cheapest - 1e-9 <= cost <= gap.dearest + 1e-9 for gap in found)
        assert inside >= behind, (cost, found)
        if inside and above is not None and below is not None:
            assert above >= below - 1e-9


def test_a_crossing_by_hand() -> None:
    parent = frontier([Point(1, 0.0, "low"), Point(3, 1.0, "high")])
    child = frontier([Point(1, 0.5, "low"), Point(3, 0.5, "high")])
    assert gaps(parent, child) == [Gap(2.0, math.inf, 0.5)]
    assert gaps(parent, parent) == [] and gaps(child, child) == []
    assert gaps(child, parent) == [Gap(1, 2.0, 0.5)]
    slow = frontier([Point(2, 2.0, "high")])
    assert gaps(parent, slow) == [Gap(1, 2, math.inf)]


def test_the_sentence() -> None:
    parent, child = [Point(1, 0.5, "high")], [Point(0.5, 0.5, "high")]
    assert verdict(parent, child) == "The child's frontier lies on or above the parent's at every request rate."
    assert "no setting as fast as 2 (its fastest: 1" in verdict(child, parent)
    assert "lies up to 0.1 below at relative request rates up to 1." in verdict(parent, [Point(1, 0.4, "high")])


def test_a_dominated_setting_is_no_vertex() -> None:
    vertices = frontier([Point(1, 0.5, "low"), Point(2, 0.4, "medium"), Point(2, 0.8, "high"), Point(3, 0.8, "max")])
    assert [point.effort for point in vertices] == ["low", "high"]
