"""Settings of long-context accuracy: which problems, and how they are graded. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lit_puzzle.environments.answer_formats import FormatChoice
from lit_puzzle.environments.environment import Environment, effort_weights
from lit_puzzle.environments.long_context_tasks import default_tasks
from lit_puzzle.environments.long_context_text import TextTask

Mode = Literal["generated", "teacher_forced"]
Graded = Literal["answer", "completion"]
Credit = Literal["share", "exact"]


@dataclass(frozen=True)
class LongContextProblems:
    """Which problems; tasks and environments take turns.

    Args:
        tasks: text tasks, laid out to `context_tokens`; None: one of each kind, unless there are `environments`.
        environments: other environments, whose prompts are taken as they are (the tiny world's, a file of AA-LCR ...).
        context_tokens: tokens of a text task's whole prompt; with the completion it must fit the parent's context.
        efforts: reasoning efforts; the problems of each are the same.
        problems_per_effort: problems at each effort.
        seed: which problems.

    Raises:
        ValueError: nothing to ask, names used twice, no `context_tokens` for text tasks, or counts below 1.
    """

    tasks: list[TextTask] | None = None
    environments: list[Environment] | None = None
    context_tokens: int | None = None
    efforts: list[str] = field(default_factory=lambda: ["high"])
    problems_per_effort: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        effort_weights(self.efforts)
        tasks = self.text_tasks()
        names = [environment.name for environment in [*tasks, *(self.environments or [])]]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"Tasks and environments {names} were given: at least one is needed, names must differ.")
        if tasks and self.context_tokens is None:
            raise ValueError("context_tokens is missing: give the length of the text tasks' prompts in tokens.")
        context_tokens = 1 if self.context_tokens is None else self.context_tokens
        if min(self.problems_per_effort, context_tokens) < 1:
            given = f"problems_per_effort {self.problems_per_effort}, context_tokens {self.context_tokens}"
            raise ValueError(f"{given} were given; 1 or more is needed.")

    def text_tasks(self) -> list[TextTask]:
        """Return the text tasks: those given, or one of each kind."""
        return default_tasks() if self.tasks is None and not self.environments else list(self.tasks or [])


@dataclass(frozen=True)
class Grading:
    """How problems are graded.

    Args:
        mode: `generated` completions, or `teacher_forced` reference answers.
        graded: teacher-forced: the `answer` in the final channel, or the whole `completion`.
        credit: teacher-forced: the `share` of right tokens, or 1 if the match is `exact`.
        answer_format: of completions; `auto`: what the tokenizer says.

    Raises:
        ValueError: another value.
    """

    mode: Mode = "generated"
    graded: Graded = "answer"
    credit: Credit = "share"
    answer_format: FormatChoice = "auto"

    def __post_init__(self) -> None:
        choices: list[tuple[str, str, Any]] = [("mode", self.mode, Mode), ("graded", self.graded, Graded)]
        choices += [("credit", self.credit, Credit), ("answer_format", self.answer_format, FormatChoice)]
        for name, given, allowed in choices:
            if given not in get_args(allowed):
                raise ValueError(f"{name} is {given!r}; allowed: {list(get_args(allowed))}.")
