"""Tasks of lm-evaluation-harness by name: the task writes the prompts and grades, an engine of this project completes.

All problems of the task's evaluation split are for measuring, none for training (`Benchmark`): the numbers are those of
the whole task. Few-shot examples are earlier turns of a chat; the chat template and the reasoning effort are the
model's, sampling and the cap on tokens the recipe's. Graded is the final text, up to the first of the task's own stop
texts (`until`), after one of its filters, by one of its metrics. How it is graded is part of each answer, so that
evaluations by another metric, or by task files that have changed, are of other problems.

Only tasks that generate: a chat model with reasoning has no log-likelihood of an answer to give. `answer` of a
`Problem` is `INDEX: target (grading)`; the row is found by the index. Grading is the task's own code on what a model
has written (a regular expression may backtrack without end): it runs in a process of its own, which loads the task
again, with a limit of seconds for each text. Tasks that run what a model writes are refused.

Needs the package `lm-eval`. Reads the task's data, which `datasets` may download; writes nothing.
"""

import json
import math
import numbers
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lit_puzzle.environments.environment import Problem
from lit_puzzle.environments.graders.grading_worker import answer_jobs
from lit_puzzle.environments.graders.worker_pool import SECONDS, run_jobs
from lit_puzzle.environments.verdict import Verdict, grader_failed, verdict_of_grade
from lit_puzzle.run.files import read_text
from lit_puzzle.run.identity import files_hash
from lit_puzzle.run.inputs import SHOWN
from lit_puzzle.run.library_calls import library_errors

GENERATES = "generate_until"
TASK_FILES = (".yaml", ".yml", ".py", ".jinja")
MODULE = "lit_puzzle.environments.harness_task"  # this one, as a program that grades


class HarnessTask:
    """The problems of one task of lm-evaluation-harness.

    Args:
        task: its name, such as `gsm8k`.
        name: under which problems and metrics appear; None: the task's.
        include: folder of task files (YAML) of your own, which are looked for first.
        metric: of the task's metrics, one that is a number from 0 to 1 for each problem; None: its first.
        filter: of the task's filters, which finds the answer in a text; None: its first.
        num_fewshot: examples before each problem; None: as many as the task says.
        seed: of the choice of examples.
        seconds: that grading one text may take; then it counts as `grader failed`.

    Raises:
        ValueError: lm-eval is not installed, there is no such task, metric or filter, or one that is refused.
    """

    is_benchmark = True

    def __init__(
        self,
        task: str,
        name: str | None = None,
        include: Path | None = None,
        metric: str | None = None,
        filter: str | None = None,
        num_fewshot: int | None = None,
        seed: int = 0,
        seconds: float = SECONDS,
    ) -> None:
        if num_fewshot is not None and num_fewshot < 0:
            raise ValueError(f"{task}: num_fewshot {num_fewshot} was given; 0 is the least.")
        if not 0 < seconds < math.inf:
            raise ValueError(f"{task}: seconds {seconds} was given; a positive, finite number is needed.")
        self.name, self.seconds = name or task, seconds
        self._task = _load(task, include)
        _check_kind(self._task, task)
        with library_errors(f"the task {task} of lm-eval"):
            self._rows = list(self._task.eval_docs)
            problems = _problems(self.name, self._task, self._rows, num_fewshot, seed)
        self._filter = _chosen(filter, list(self._filtered("", 0)), f"{task}: filter")
        with library_errors(f"the task {task} of lm-eval"):
            metrics = list(self._found("", 0))
        self._metric = _chosen(metric, metrics, f"{task}: metric")
        if self._task.higher_is_better().get(self._metric) is False:
            raise ValueError(f"{task}: the task says of its metric {self._metric} that lower is better. Name another.")
        self._grade("", 0)  # whether it can be graded, before anything is generated
        grading = f"({self._metric}, {self._filter}, {_version(include)})"
        self.problems = tuple(replace(problem, answer=f"{problem.answer} {grading}") for problem in problems)
        settings = {"task": task, "include": None if include is None else str(include)}
        chosen = {"metric": self._metric, "filter": self._filter, "num_fewshot": 0}
        self._program = ("-m", MODULE, json.dumps(settings | chosen))

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem."""
        return rng.choice(self.problems)

    def verify(self, final: str, problem_answer: str) -> float:
        """Return the task's grade of a final text; in this process, without a limit of time."""
        return self._grade(final, int(problem_answer.partition(":")[0]))

    def verify_all(self, finals: Sequence[str], problem_answers: Sequence[str]) -> list[Verdict]:
        """Return the verdict on each final text, from a process of its own with a limit of time."""
        pairs = zip(finals, problem_answers, strict=True)
        jobs = [{"kind": "harness", "final": final, "answer": answer} for final, answer in pairs]
        replies = run_jobs(jobs, self.seconds, self._program, workers=1)
        return [
            grader_failed(f"lm-eval: {reply['failed']}") if "failed" in reply else verdict_of_grade(reply["grade"])
            for reply in replies
        ]

    def _filtered(self, final: str, index: int) -> dict[str, Any]:
        """Return what each filter makes of a final text."""
        from lm_eval.api.instance import Instance

        until = self._task.config.generation_kwargs.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            final = final.split(stop)[0] if stop else final
        instance = Instance(GENERATES, self._rows[index], ("", {}), 0, resps=[final])
        for each in self._task._filters:
            each.apply([instance])
        return dict(instance.filtered_resps)

    def _found(self, final: str, index: int) -> dict[str, Any]:
        """Return the value of every metric."""
        found: dict[str, Any] = self._task.process_results(
            self._rows[index], [self._filtered(final, index)[self._filter]]
        )
        return found

    def _grade(self, final: str, index: int) -> float:
        found = self._found(final, index)
        grade = found[self._metric]
        if not isinstance(grade, numbers.Real | bool) or not 0 <= float(grade) <= 1:
            raise ValueError(
                f"{self.name}: the metric {self._metric} of a problem is {str(grade)[:80]!r}; one that is a number "
                f"from 0 to 1 is needed. The task has {sorted(found)}."
            )
        return float(grade)


def _load(task: str, include: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The environment HarnessTask needs lm-eval ({error}): pip install 'lit-puzzle[lm-eval]'."
        ) from error
    if include is not None and not include.is_dir():
        raise ValueError(f"{task}: include {include} is no folder; give one of task files (YAML).")
    with library_errors(f"the task {task} of lm-eval"):
        for file in [] if include is None else include.rglob("*.y*ml"):
            _check_yaml(file)
        manager = None if include is None else TaskManager(include_path=str(include), include_defaults=False)
        if manager is None or task not in manager.all_tasks:
            manager = TaskManager()
        known = manager.all_tasks
        found = manager.load([task])["tasks"] if task in known else {}
    if len(found) != 1:
        parts = f"a group of {', '.join(list(found)[:5])}; name one of its tasks" if found else "not known"
        raise ValueError(f"lm-eval: {task} is {parts}. `lm_eval --tasks list` prints the names.")
    return next(iter(found.values()))


def _check_yaml(file: Path) -> None:
    """Refuse a task file that lm-eval would leave out without a word; its own tags (`!function`) are passed over."""
    try:
        for _ in yaml.parse(read_text(file), Loader=yaml.SafeLoader):
            pass
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from error


def _version(include: Path | None) -> str:
    """Return what the code that grades is: the version of lm-eval, and a hash of the task files of one's own."""
    found = f"lm-eval {version('lm-eval')}"
    if include is None:
        return found
    names = [path.relative_to(include).as_posix() for path in include.rglob("*") if path.suffix in TASK_FILES]
    return f"{found}, files {files_hash(include, sorted(names))[:SHOWN]}"


def _check_kind(task: Any, name: str) -> None:
    """Refuse tasks that cannot be asked of a chat model, or that run its answers."""
    if task.OUTPUT_TYPE != GENERATES:
        raise ValueError(
            f"{name}: its requests are {task.OUTPUT_TYPE}, which compare log-likelihoods of given answers; a model "
            "that reasons before it answers has none to give. Take a task that generates (generate_until)."
        )
    if task.config.unsafe_code is not False:
        raise ValueError(f"{name}: it runs what the model writes, outside a sandbox. Take lit_puzzle's code problems.")
    if task.multiple_input or task.config.doc_to_image is not None or task.config.doc_to_audio is not None:
        raise ValueError(f"{name}: a problem of it is more than one text. Take another task.")


def _problems(name: str, task: Any, rows: list[Any], num_fewshot: int | None, seed: int) -> tuple[Problem, ...]:
    """Return every problem of a task, in its order; examples are drawn anew for each from one stream."""
    task.set_fewshot_seed(seed=seed)
    count = (task.config.num_fewshot or 0) if num_fewshot is None else num_fewshot
    problems = []
    for index, row in enumerate(rows):
        messages = _messages(task, row, count)
        if not messages or messages[-1]["role"] != "user":
            raise ValueError(f"{name}: the task begins the answer itself (gen_prefix), which no chat template allows.")
        problems.append(Problem(name, messages, f"{index}: {task.doc_to_target(row)}", source=f"{name}:{index}"))
    if not problems:
        raise ValueError(f"{name}: the task has no problem.")
    return tuple(problems)


def _messages(task: Any, row: Any, num_fewshot: int) -> tuple[dict[str, str], ...]:
    taken: list[dict[str, str]] = []

    def template(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        taken.extend(history)
        return ""

    prefix = task.doc_to_prefix(row)
    task.fewshot_context(
        row,
        num_fewshot=num_fewshot,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        chat_template=template,
        gen_prefix=prefix,
    )
    return tuple({"role": message["role"], "content": message["content"]} for message in taken)


def _chosen(given: str | None, known: list[str], what: str) -> str:
    """Return the one that is given, or the first."""
    if given is not None and given not in known:
        raise ValueError(f"{what} {given} was given; the task has {', '.join(known)}.")
    return known[0] if given is None else given


def main(settings: str, descriptor: int) -> None:
    """Answer jobs of `HarnessTask.verify_all` until the other end is closed (`lit_puzzle.environments.graders`).

    Args:
        settings: of the task, as JSON.
        descriptor: of the connection.
    """

    @cache
    def load(_kind: str) -> Any:
        given = json.loads(settings)
        task = HarnessTask(**given | {"include": given["include"] and Path(given["include"])})
        return lambda job: {"grade": task.verify(job["final"], job["answer"])}

    answer_jobs(descriptor, load)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
