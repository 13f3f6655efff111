"""grading.py: verdicts on completions, one by one and many at once."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from lit_puzzle.environments.completion import ParsedCompletion
from lit_puzzle.environments.environment import Problem
from lit_puzzle.environments.grading import BatchEnvironment, Ungraded, grade, grade_all
from lit_puzzle.environments.verdict import RIGHT, WRONG, Verdict


class Single:
    """Returns what it is told, or raises it."""

    def __init__(self, name: str, result: Any = None) -> None:
        self.name, self.result = name, result

    def problem(self, rng: random.Random) -> Problem:
        raise NotImplementedError

    def verify(self, final: str, problem_answer: str) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return float(final == problem_answer) if self.result is None else self.result


class Many(Single):
    """Counts how often it is called."""

    calls = 0

    def verify_all(self, finals: Sequence[str], problem_answers: Sequence[str]) -> list[Verdict]:
        self.calls += 1
        return [Verdict(float(final == answer), "counted") for final, answer in zip(finals, problem_answers)]


def final(text: str) -> ParsedCompletion:
    return ParsedCompletion(text, None, "final")


def test_many_completions_are_graded_at_once_and_in_order() -> None:
    one, many = Single("one"), Many("many")
    assert isinstance(many, BatchEnvironment) and not isinstance(one, BatchEnvironment)
    completions = [
        Ungraded("many", final("a"), "a"),
        Ungraded("one", final("a"), "a"),
        Ungraded("many", final("b"), "a"),
        Ungraded("one", final("b"), "a"),
        Ungraded("many", ParsedCompletion(None, None, "unfinished"), "a", "length"),
        Ungraded("one", ParsedCompletion(None, "hm", "no_final"), "a"),
        Ungraded("one", ParsedCompletion(None, None, "tool_call"), "a"),
    ]
    counted = [Verdict(1.0, "counted"), Verdict(0.0, "counted")]
    reasons = [Verdict(0.0, reason) for reason in ("cut off", "no final answer", "tool call")]
    assert grade_all([one, many], completions) == [counted[0], RIGHT, counted[1], WRONG, *reasons]
    assert many.calls == 1
    assert grade_all([one, many], []) == []


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (1, RIGHT),
        (0.25, Verdict(0.25, "partly right")),
        (ValueError("a\n b"), Verdict(0.0, "grader failed: ValueError: a b")),
        (RecursionError(), Verdict(0.0, "grader failed: RecursionError:")),
    ],
)
def test_results_become_verdicts(result: Any, verdict: Verdict) -> None:
    assert grade(Single("one", result), final("a"), "a") == verdict


@pytest.mark.parametrize("result", [2.0, float("nan"), "1", -0.1])
def test_other_results_stop_the_run(result: Any) -> None:
    with pytest.raises(ValueError, match="a number from 0 to 1 is needed"):
        grade(Single("one", result), final("a"), "a")


def test_an_unknown_environment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"environments \['two'\]"):
        grade_all([Single("one")], [Ungraded("two", final("a"), "a")])
