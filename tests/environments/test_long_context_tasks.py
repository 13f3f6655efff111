"""long_context_tasks.py: answers against an independent solver of the text, near misses, whole-text aggregation."""

import random
import re
from collections import Counter

import pytest
from helpers.text_solvers import solve

from lit_puzzle.environments.environment import Problem
from lit_puzzle.environments.long_context_tasks import (
    FrequentWord,
    RecordCount,
    Retrieval,
    VariableChain,
    default_tasks,
)
from lit_puzzle.environments.long_context_text import TextTask, problem_of

TASKS: list[TextTask] = [
    *default_tasks(),
    Retrieval("both", num_keys=3, num_values=2),
    VariableChain("one_hop", hops=1),
    Retrieval("only_records", record_share=1.0),
]
IDS = [task.name for task in TASKS]


def draw(task: TextTask, seed: int, count: int = 60) -> Problem:
    return problem_of(task, task.draft(random.Random(seed)), count)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
@pytest.mark.parametrize("count", [0, 1, 7, 60, 400])
def test_answer_is_what_an_independent_solver_finds(task: TextTask, count: int) -> None:
    for seed in range(6):
        problem = draw(task, seed, count)
        solved = solve(problem.messages[0]["content"])
        assert sorted(solved) == sorted(re.split(", ", problem.answer))
        assert task.verify(", ".join(solved), problem.answer) == 1.0
        assert problem.environment == task.name and problem.messages[0]["role"] == "user"


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_problems_follow_from_the_seed(task: TextTask) -> None:
    assert task.problem(random.Random(5)) == task.problem(random.Random(5))
    texts = {task.problem(random.Random(seed)).text() for seed in range(20)}
    assert len(texts) == 20


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_the_answer_is_right_and_nothing_is_wrong(task: TextTask) -> None:
    answer = draw(task, 0).answer
    assert task.verify(answer, answer) == 1.0 and task.verify("", answer) == 0.0


CASES = [
    (Retrieval(), "482913", ["The note on amber-falcon-172 says 482,913.", "**482913**", "482913. Yes, 482913"]),
    (Retrieval(num_values=2), "111111, 222222", ["222222 and 111111", "111,111; 222,222", "1: 222222\n2: 111111"]),
    (Retrieval(num_keys=2), "111111, 222222", ["111111,222222", "wise-raven-100: 111111, icy-owl-200: 222222"]),
    (Retrieval(num_keys=2, num_values=2), "111111, 222222, 333333, 444444", ["222222 111111, 444444 333333"]),
    (VariableChain(), "482913", ["It takes the value of icy-owl-200, hence 482913"]),
    (RecordCount(), "7", ["7", "There are 7 crates.", "7 (amber-falcon-172 and six more)"]),
    (FrequentWord(), "raven", ["Raven", "The most frequent word is 'raven'."]),
]
MISSES = [
    (Retrieval(), "482913", ["482914", "4829130", "48291", "482913 or 111111", "-"]),
    (Retrieval(num_values=2), "111111, 222222", ["111111", "111111, 222222, 333333", "111111, 222223"]),
    (Retrieval(num_keys=2), "111111, 222222", ["222222, 111111", "111111", "111111, 222222, 333333"]),
    (Retrieval(num_keys=2, num_values=2), "111111, 222222, 333333, 444444", ["111111 333333 222222 444444"]),
    (VariableChain(), "482913", ["482912", "icy-owl-200"]),
    (RecordCount(), "7", ["8", "77", "7 or 8", "7.5", "-7", "seven", "amber-falcon-7"]),
    (FrequentWord(), "raven", ["ravens", "raven or otter", "otter", "crow"]),
]


@pytest.mark.parametrize(("task", "answer", "texts"), CASES)
def test_tolerated_forms(task: TextTask, answer: str, texts: list[str]) -> None:
    assert {text: task.verify(text, answer) for text in texts} == dict.fromkeys(texts, 1.0)


@pytest.mark.parametrize(("task", "answer", "texts"), MISSES)
def test_near_misses_are_wrong(task: TextTask, answer: str, texts: list[str]) -> None:
    assert {text: task.verify(text, answer) for text in texts} == dict.fromkeys(texts, 0.0)


def test_the_question_alone_and_a_guess_at_the_distractors_fail() -> None:
    for task in (Retrieval(), VariableChain()):
        problem = draw(task, 3)
        others = set(re.findall(r"\b\d{6}\b", problem.messages[0]["content"])) - {problem.answer}
        assert len(others) > 3  # there is something to confuse it with
        assert all(task.verify(other, problem.answer) == 0.0 for other in others)


def test_following_needs_every_hop() -> None:
    for seed in range(10):
        lines = draw(VariableChain(hops=3), seed).messages[0]["content"].split("\n")
        pairs = lines[-1].removeprefix("What is the value of ").split("?")[0]
        hops = 0
        while True:
            (line,) = [line for line in lines[:-1] if line.startswith(f"The value of {pairs} is ")]
            if "that of" not in line:
                break
            hops, pairs = hops + 1, line.split(" that of ")[1].rstrip(".")
        assert hops == 3


@pytest.mark.parametrize("count", [0, 1, 2, 3, 37, 200])
def test_the_most_frequent_word_is_not_that_of_any_quarter(count: int) -> None:
    problem = draw(FrequentWord(), count, count)
    rows = problem.messages[0]["content"].split("\n")[1:-2]
    assert len(rows) == count + 3
    (word, often), (_, next_often) = Counter(" ".join(rows).split()).most_common(2)
    assert word == problem.answer and often == len(rows) > next_often
    if len(rows) >= 8:
        for end in (rows[: len(rows) // 4], rows[-(len(rows) // 4) :], rows[-(len(rows) // 5) * 2 :]):
            assert Counter(" ".join(end).split()).most_common(1)[0][0] != word


def test_bad_settings_are_named() -> None:
    for make, message in (
        (lambda: Retrieval("mine", num_keys=0), "mine: num_keys must be at least 1"),
        (lambda: Retrieval(record_share=1.5), "record_share must be from 0 to 1, got 1.5"),
        (lambda: VariableChain(hops=0), "hops must be at least 1"),
        (lambda: RecordCount(most=1), "most must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
