"""The tiny world: three environments with problems that a model of two million parameters can reason about.

Every problem is a shuffled table of 16 definitions and a question about some of them, so that a solution needs long
retrieval. Answers are verified exactly. Every family has a worked solution (trace) at each reasoning effort.

    chains    `` q=b+3 b=k+1 k=5`` and `value:q?`     follow the links, add the offsets modulo 10          (a digit)
    sorting   `` q=7 b=2 k=5``     and `order:qbk?`   the letters by ascending value                       (letters)
    counting  `` q=7 b=2 k=5``     and `above:4,qbk?` how many of the letters have a value above the bound (a digit)

At low effort the answer comes at once; at medium effort after a copy of the needed definitions; at high effort after
all steps, each close to the step before it. Only the traces teach this difference.

Reads and writes nothing. Source: this project's own.
"""

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from lit_puzzle.environments.environment import Environment, Problem

LETTERS = "abcdefghijklmnopqrst"
TABLE_SIZE = 16
CHAIN_LENGTHS = (5, 4, 3, 2, 1, 1)  # disjoint chains; together a table

_DEFINITION = re.compile(r" ([a-t])=(?:([a-t])\+)?(\d)")
_QUESTION = re.compile(r"(?:value:|order:|above:(\d),)([a-t]+)\?")

Definition = tuple[str | None, int]  # (letter it refers to, offset) or (None, value)
Table = dict[str, Definition]  # in the order in which the prompt shows it


class Family(Environment, Protocol):
    """Environment of the tiny world: problems that share a table, and worked solutions."""

    def problems(self, rng: random.Random, count: int) -> list[Problem]:
        """Draw `count` problems about one table."""
        ...

    def analysis(self, problem: Problem, effort: str) -> str:
        """Return the text of the analysis channel at an effort; empty at low."""
        ...

    def trace(self, problem: Problem, effort: str) -> str:
        """Return the whole worked solution, from the first channel to ``<|return|>``."""
        ...


class Chains:
    """Links between letters: the question is for the value at the end of a chain of 0 to 4 additions.

    Args:
        depth_weights: relative frequency of questions that are 0, 1, 2, 3, 4 links deep.

    Raises:
        ValueError: not five weights, or weights that are negative or all 0.
    """

    name = "chains"

    def __init__(self, depth_weights: Sequence[float] = (30, 30, 20, 12, 8)) -> None:
        self.depth_weights = _checked_weights(self.name, "depth_weights", depth_weights, max(CHAIN_LENGTHS))

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem with its own table."""
        return self.problems(rng, 1)[0]

    def problems(self, rng: random.Random, count: int) -> list[Problem]:
        """Draw `count` problems about one table."""
        table = _chain_table(rng)
        by_depth: dict[int, list[str]] = {}
        for letter in table:
            by_depth.setdefault(len(_walk(table, letter)) - 1, []).append(letter)
        depths = rng.choices(range(len(self.depth_weights)), self.depth_weights, k=count)
        letters = [rng.choice(by_depth[depth]) for depth in depths]
        return [_problem(self.name, table, f"value:{x}?", str(chain_value(table, x))) for x in letters]

    def analysis(self, problem: Problem, effort: str) -> str:
        """Return the needed definitions (medium), followed by every step (high)."""
        table, letters, _ = parse(problem)
        walk = _walk(table, letters[0])
        down = "".join(define(table, letter) for letter in walk)
        base = f" {walk[-1]}:{chain_value(table, walk[-1])}"
        up = "".join(f"{define(table, x)} {x}:{chain_value(table, x)}" for x in reversed(walk[:-1]))
        return {"low": "", "medium": down, "high": down + base + up}[effort]

    def trace(self, problem: Problem, effort: str) -> str:
        """Return the worked solution at an effort."""
        return completion(self.analysis(problem, effort), problem.answer)

    def verify(self, final: str, problem_answer: str) -> float:
        """Return 1.0 if the final channel is exactly the answer, otherwise 0.0."""
        return verify_exactly(final, problem_answer)


class Sorting:
    """Letters with values: the question is for the order of some letters, whose values are all different.

    Args:
        size_weights: relative frequency of questions about 2, 3, 4, 5 letters.

    Raises:
        ValueError: not four weights, or weights that are negative or all 0.
    """

    name = "sorting"

    def __init__(self, size_weights: Sequence[float] = (35, 35, 20, 10)) -> None:
        self.size_weights = _checked_weights(self.name, "size_weights", size_weights, 4)

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem with its own table."""
        return self.problems(rng, 1)[0]

    def problems(self, rng: random.Random, count: int) -> list[Problem]:
        """Draw `count` problems about one table."""
        table = _value_table(rng)
        return [self._draw(rng, table) for _ in range(count)]

    def _draw(self, rng: random.Random, table: Table) -> Problem:
        one_of_each = {table[letter][1]: letter for letter in rng.sample(list(table), len(table))}
        size = min(rng.choices((2, 3, 4, 5), self.size_weights)[0], len(one_of_each))
        letters = rng.sample(sorted(one_of_each.values()), size)
        return _problem(self.name, table, f"order:{''.join(letters)}?", "".join(_ascending(table, letters)))

    def analysis(self, problem: Problem, effort: str) -> str:
        """Return the needed definitions (medium), followed by every step (high)."""
        table, letters, _ = parse(problem)
        listed = "".join(_valued(table, letter) for letter in letters)
        ordered = "".join(_valued(table, letter) for letter in _ascending(table, letters))
        return {"low": "", "medium": listed, "high": f"{listed} |{ordered}"}[effort]

    def trace(self, problem: Problem, effort: str) -> str:
        """Return the worked solution at an effort."""
        return completion(self.analysis(problem, effort), problem.answer)

    def verify(self, final: str, problem_answer: str) -> float:
        """Return 1.0 if the final channel is exactly the answer, otherwise 0.0."""
        return verify_exactly(final, problem_answer)


class Counting:
    """Letters with values: the question is how many of some letters have a value above a bound.

    Args:
        size_weights: relative frequency of questions about 2, 3, 4, 5, 6 letters.

    Raises:
        ValueError: not five weights, or weights that are negative or all 0.
    """

    name = "counting"

    def __init__(self, size_weights: Sequence[float] = (25, 25, 20, 15, 15)) -> None:
        self.size_weights = _checked_weights(self.name, "size_weights", size_weights, 5)

    def problem(self, rng: random.Random) -> Problem:
        """Draw one problem with its own table."""
        return self.problems(rng, 1)[0]

    def problems(self, rng: random.Random, count: int) -> list[Problem]:
        """Draw `count` problems about one table."""
        table = _value_table(rng)
        return [self._draw(rng, table) for _ in range(count)]

    def _draw(self, rng: random.Random, table: Table) -> Problem:
        letters = rng.sample(list(table), rng.choices((2, 3, 4, 5, 6), self.size_weights)[0])
        bound = rng.randrange(1, 8)
        above = sum(table[letter][1] > bound for letter in letters)
        return _problem(self.name, table, f"above:{bound},{''.join(letters)}?", str(above))

    def analysis(self, problem: Problem, effort: str) -> str:
        """Return the needed definitions (medium), followed by every step (high)."""
        table, letters, bound = parse(problem)
        text, above = "", 0
        for letter in letters:
            is_above = table[letter][1] > bound
            above += is_above
            text += _valued(table, letter) + (f"{'>' if is_above else '<'}{above}" if effort == "high" else "")
        return "" if effort == "low" else text

    def trace(self, problem: Problem, effort: str) -> str:
        """Return the worked solution at an effort."""
        return completion(self.analysis(problem, effort), problem.answer)

    def verify(self, final: str, problem_answer: str) -> float:
        """Return 1.0 if the final channel is exactly the answer, otherwise 0.0."""
        return verify_exactly(final, problem_answer)


def parse(problem: Problem) -> tuple[Table, str, int]:
    """Return the table of a problem, the letters of its question, and the bound (0 if the question has none).

    Raises:
        ValueError: the text is not a problem of the tiny world.
    """
    content = problem.messages[-1]["content"]
    head, _, question = content.partition("\n")
    found = _QUESTION.fullmatch(question)
    table: Table = {letter: (link or None, int(number)) for letter, link, number in _DEFINITION.findall(head)}
    if found is None or not table or not set(found[2]) <= set(table):
        raise ValueError(f"{content!r} is not a problem of the tiny world. Use problems drawn by its families.")
    return table, found[2], int(found[1] or 0)


def define(table: Table, letter: str) -> str:
    """Return the text of a definition in the table."""
    link, number = table[letter]
    return f" {letter}={number}" if link is None else f" {letter}={link}+{number}"


def chain_value(table: Table, letter: str) -> int:
    """Return the value of a letter: the base of its chain plus all offsets, modulo 10."""
    return sum(table[step][1] for step in _walk(table, letter)) % 10


def completion(analysis: str, answer: str) -> str:
    """Return an assistant's whole completion; an empty analysis has no channel."""
    thinking = f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant" if analysis else ""
    return f"{thinking}<|channel|>final<|message|>{answer}<|return|>"


def verify_exactly(final: str, problem_answer: str) -> float:
    """Return 1.0 if the final text is exactly the answer, otherwise 0.0."""
    return float(final == problem_answer)


def _problem(name: str, table: Table, question: str, answer: str) -> Problem:
    content = f"{name}{''.join(define(table, letter) for letter in table)}\n{question}"
    return Problem(name, ({"role": "user", "content": content},), answer)


def _chain_table(rng: random.Random) -> Table:
    letters = rng.sample(LETTERS, TABLE_SIZE)
    definitions: list[tuple[str, Definition]] = []
    for length in CHAIN_LENGTHS:
        chain, letters = letters[:length], letters[length:]
        definitions.append((chain[0], (None, rng.randrange(10))))
        definitions += [(here, (before, rng.randint(1, 3))) for before, here in pairwise(chain)]
    rng.shuffle(definitions)
    return dict(definitions)


def _value_table(rng: random.Random) -> Table:
    return {letter: (None, rng.randrange(10)) for letter in rng.sample(LETTERS, TABLE_SIZE)}


def _walk(table: Table, letter: str) -> list[str]:
    """Return the letters from one down to the base of its chain."""
    steps, link = [letter], table[letter][0]
    while link is not None:
        steps.append(link)
        link = table[link][0]
    return steps


def _ascending(table: Table, letters: Sequence[str]) -> list[str]:
    return sorted(letters, key=lambda letter: table[letter][1])


def _valued(table: Table, letter: str) -> str:
    return f" {letter}:{table[letter][1]}"


def _checked_weights(family: str, name: str, weights: Sequence[float], count: int) -> tuple[float, ...]:
    if len(weights) != count or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"{family}: {name} {tuple(weights)} must be {count} numbers >= 0, one of them > 0.")
    return tuple(weights)
