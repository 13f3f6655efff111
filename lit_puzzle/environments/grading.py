"""Grades completions by their environments: one by one, or many at once where an environment can (`BatchEnvironment`).

Only final answers are graded. A completion without one gets 0 and the reason; so does one that a grader fails on, which
is counted (`grader failed`), never guessed. Reads and writes nothing. Needs no torch.
"""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from lit_puzzle.environments.completion import REASONS, ParsedCompletion
from lit_puzzle.environments.environment import Environment
from lit_puzzle.environments.verdict import Verdict, grader_failed, verdict_of_grade

Finish = Literal["stop", "length"]
CUT_OFF = "cut off"  # the reason of a completion that the cap on its length has ended
GRADER_ERRORS = (ValueError, ArithmeticError, LookupError, RecursionError)  # what a grader raises on a strange text


@runtime_checkable
class BatchEnvironment(Environment, Protocol):
    """An environment that verifies many final texts at once: its graders run in processes, on all cores."""

    def verify_all(self, finals: Sequence[str], problem_answers: Sequence[str]) -> list[Verdict]:
        """Return the verdict on each final text; what a grader fails on is `grader failed`."""
        ...


@dataclass(frozen=True)
class Ungraded:
    """A completion to grade.

    Attributes:
        environment: name of the environment.
        parsed: the completion.
        answer: the right answer.
        finish: how the completion ended.
    """

    environment: str
    parsed: ParsedCompletion
    answer: str
    finish: Finish = "stop"


def grade_all(environments: Sequence[Environment], completions: Sequence[Ungraded]) -> list[Verdict]:
    """Return the verdict on each completion, in order; those of one environment are graded at once.

    Args:
        environments: of the completions.
        completions: to grade.

    Raises:
        ValueError: an unknown environment, or one that returns something else than a verdict or a number from 0 to 1.
    """
    by_name: Mapping[str, Environment] = {environment.name: environment for environment in environments}
    unknown = sorted({completion.environment for completion in completions} - set(by_name))
    if unknown:
        raise ValueError(f"Completions of environments {unknown} were given; the environments are {sorted(by_name)}.")
    verdicts: list[Verdict] = [_without_final(completion) for completion in completions]
    for name, environment in by_name.items():
        places = [
            place
            for place, completion in enumerate(completions)
            if completion.environment == name and completion.parsed.final is not None
        ]
        finals = [str(completions[place].parsed.final) for place in places]
        found = _verify(environment, finals, [completions[place].answer for place in places])
        for place, verdict in zip(places, found, strict=True):
            verdicts[place] = verdict
    return verdicts


def grade(environment: Environment, parsed: ParsedCompletion, answer: str, finish: Finish = "stop") -> Verdict:
    """Return the verdict on one completion; see `grade_all`."""
    return grade_all([environment], [Ungraded(environment.name, parsed, answer, finish)])[0]


def _without_final(completion: Ungraded) -> Verdict:
    """Return the verdict on a completion without a final answer."""
    status = completion.parsed.status
    return Verdict(0.0, CUT_OFF if completion.finish == "length" else REASONS.get(status, status))


def _verify(environment: Environment, finals: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    if isinstance(environment, BatchEnvironment):
        return environment.verify_all(finals, answers) if finals else []
    return [_verify_one(environment, final, answer) for final, answer in zip(finals, answers)]


def _verify_one(environment: Environment, final: str, answer: str) -> Verdict:
    try:
        correct: Any = environment.verify(final, answer)
    except GRADER_ERRORS as error:
        return grader_failed(f"{type(error).__name__}: {error}")
    if not isinstance(correct, numbers.Real) or not 0 <= float(correct) <= 1:
        raise ValueError(
            f"Environment {environment.name!r}: verify returned {correct!r}; a number from 0 to 1 is needed."
        )
    return verdict_of_grade(float(correct))
