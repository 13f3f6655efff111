"""long_context_text.py: names drawn once, needles at their depths, exact lengths under any token count."""

import random

import pytest

from lit_puzzle.environments.environment import Problem
from lit_puzzle.environments.long_context_tasks import Retrieval
from lit_puzzle.environments.long_context_text import (
    FILLER_WORDS,
    MOST_LINES,
    Names,
    fit,
    most,
    problem_of,
    prose,
    spread,
)


def test_names_are_never_drawn_twice() -> None:
    names = Names(random.Random(0))
    codes = [names.code() for _ in range(50_000)]
    keys = [names.key() for _ in range(50_000)]
    assert len({*codes, *keys}) == 100_000
    used = frozenset(codes[:100])
    again = Names(random.Random(0), used)
    assert not used & {again.code() for _ in range(1000)}


def test_needles_lie_at_their_depths() -> None:
    others = [str(index) for index in range(8)]
    assert spread(["a", "b"], others, 0.5) == ["0", "1", "a", "2", "3", "4", "5", "b", "6", "7"]
    assert spread(["a", "b"], others, 0.0)[0] == "a"
    assert spread(["a"], [], 0.9) == ["a"]
    assert spread([], others, 0.3) == others


@pytest.mark.parametrize("slope", [1, 7, 40])
def test_most_is_the_largest_that_fits(slope: int) -> None:
    rng = random.Random(slope)
    sizes = [rng.randint(1, slope) for _ in range(3000)]
    total = [13]
    for size in sizes:
        total.append(total[-1] + size)
    pairs = 0

    def length(count: int) -> int:
        nonlocal pairs
        pairs += 1
        return total[count] if count < len(total) else total[-1] + slope * (count - len(total) + 1)

    for limit in (13, 14, 100, 1234, total[-1]):
        pairs, expected = 0, max(count for count, tokens in enumerate(total) if tokens <= limit)
        assert most(length, limit) == expected
        assert pairs <= 20  # of 3000


def words(problem: Problem) -> int:
    """A length under which ' on' is one token."""
    return len(problem.text().split())


def characters(problem: Problem) -> int:
    """A length under which only '!' and '.' are single tokens."""
    return len(problem.text())


def pairs(problem: Problem) -> int:
    """A length under which no filler word is one token: two each."""
    return 2 * len(problem.text())


@pytest.mark.parametrize("length", [words, characters])
@pytest.mark.parametrize("tokens", [300, 301, 302, 303, 304, 305, 306, 307, 2000])
def test_length_is_exact(length: object, tokens: int) -> None:
    assert callable(length)
    task = Retrieval(num_values=2)
    problem = fit(task, task.draft(random.Random(tokens)), length, tokens)
    assert length(problem) == tokens


def test_length_is_never_above() -> None:
    task = Retrieval()
    for tokens in (1001, 1002):
        problem = fit(task, task.draft(random.Random(1)), pairs, tokens)
        assert tokens - 2 < pairs(problem) <= tokens


def test_a_context_that_holds_no_needles_is_refused() -> None:
    task = Retrieval(num_keys=4)
    draft = task.draft(random.Random(0))
    shortest = words(problem_of(task, draft, 0))
    assert words(fit(task, draft, words, shortest)) == shortest
    with pytest.raises(ValueError, match=f"context_tokens is {shortest - 1}.*are {shortest} tokens"):
        fit(task, draft, words, shortest - 1)
    with pytest.raises(ValueError, match="at most 400000"):
        problem_of(task, draft, MOST_LINES + 1)


def test_prose_and_filler_words_hold_no_digits() -> None:
    rng = random.Random(0)
    text = " ".join([prose(rng) for _ in range(200)] + list(FILLER_WORDS))
    assert not any(character.isdigit() for character in text)
