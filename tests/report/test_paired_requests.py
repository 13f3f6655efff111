"""Pairs of requests by hand, and intervals against the formula for a mean and against pairs that cancel."""

import random
from collections.abc import Mapping

import pytest

from lit_puzzle.environments.episodes import Episode
from lit_puzzle.environments.verdict import Verdict
from lit_puzzle.evaluate.standard_errors import mean_and_error
from lit_puzzle.report.paired_requests import intervals, pair
from lit_puzzle.report.request_rates import Model, judge


def episode(task: str, effort: str, problem: int, correct: float, tokens: int) -> Episode:
    return Episode(task, effort, problem, Verdict(correct, ""), tokens)


def drawn(seed: int, prompts: int = 200, like: list[Episode] | None = None) -> list[Episode]:
    """Episodes of two tasks at two efforts; with `like` they differ from it in one prompt of ten."""
    draw = random.Random(seed)
    found: list[Episode] = []
    for task in ("a", "b"):
        for effort in ("low", "high"):
            for problem in range(prompts):
                correct, tokens = float(draw.random() < 0.6), draw.randrange(1, 100)
                if like is not None and draw.random() < 0.9:
                    correct, tokens = like[len(found)].correct, like[len(found)].generated_tokens
                found.append(episode(task, effort, problem, correct, tokens))
    return found


def test_means_by_hand() -> None:
    parent = [
        episode("a", "low", 1, 1, 4),
        episode("a", "low", 2, 0, 8),
        episode("b", "low", 1, 1, 10),
        episode("b", "low", 1, 0, 20),
        episode("b", "low", 3, 1, 30),
    ]
    old, new = pair(parent, parent).models((3.0, 6.0))
    assert old.settings == new.settings and (old.throughput, new.throughput) == (3, 6)
    setting = old.settings["low"]
    assert setting.accuracy == pytest.approx({"a": 0.5, "b": 2 / 3}) and setting.tokens == pytest.approx((6 + 20) / 2)


def test_an_interval_is_that_of_the_formula() -> None:
    parent, child = drawn(0), drawn(1)
    requests = pair(parent, child)

    def numbers(old: Model, new: Model) -> Mapping[str, float]:
        return judge(old, new, "high")

    low, high = intervals(requests, (1, 1), numbers, 4000, 0)["accuracy/low/difference"]
    values = [n.correct - o.correct for o, n in zip(parent, child, strict=True) if o.effort == "low"]
    mean, error = mean_and_error(values)  # both tasks have as many prompts
    assert (low + high) / 2 == pytest.approx(mean, abs=0.15 * error)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_what_is_equal_for_both_cancels() -> None:
    parent = drawn(0)
    found = [
        intervals(pair(parent, child), (1, 1), lambda old, new: judge(old, new, "high"), 500, 0)
        for child in (drawn(1), drawn(1, like=parent), parent)
    ]
    widths = [high - low for low, high in (one["tokens/high/ratio"] for one in found)]
    assert widths[2] == 0 < 2 * widths[1] < widths[0]
    assert found[2]["request_rate/low/ratio"] == (1, 1)


def test_a_number_that_a_resample_lacks_has_no_interval() -> None:
    parent = [episode("a", "high", problem, float(problem == 0), 5) for problem in range(4)]
    found = intervals(pair(parent, parent), (1, 1), lambda old, new: judge(old, new, "high"), 200, 0)
    assert "accuracy/high/retention" not in found and "accuracy/high/difference" in found


def test_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="4 requests of the parent and 4 of the child are not of the same prompts"):
        pair(drawn(0, prompts=1), drawn(0, prompts=1)[::-1])
    with pytest.raises(ValueError, match="Task a has one prompt only"):
        pair(drawn(0, prompts=1), drawn(0, prompts=1))
