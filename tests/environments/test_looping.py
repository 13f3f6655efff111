"""looping.py: what a loop is, against a definition that is written out."""

import random
from collections.abc import Sequence

import pytest

from lit_puzzle.environments.looping import (
    MAX_PERIOD,
    MAX_TAIL,
    MIN_REPEATS,
    MIN_TOKENS,
    WINDOW,
    is_looping,
    looping_share,
    words_of,
)


def by_definition(tokens: Sequence[int]) -> bool:
    """Every period, every end within the tail, token by token."""
    for cut in range(MAX_TAIL + 1):
        x = list(tokens[: len(tokens) - cut])
        for n in range(1, min(MAX_PERIOD, len(x)) + 1):
            run = 0
            while run + n < len(x) and x[len(x) - 1 - run] == x[len(x) - 1 - run - n]:
                run += 1
            if run + n >= max(MIN_REPEATS * n, MIN_TOKENS):
                return True
    return False


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([1] * 64, True),
        ([1] * 63, False),
        (list(range(20)) * 4, True),
        (list(range(20)) * 4 + [99], True),  # the end token
        (list(range(20)) * 4 + list(range(100, 117)), False),  # it has found its way out
        (list(range(500)) + list(range(30)) * 4 + [7] * 10, True),
        (list(range(30)) * 3, False),
        (list(range(1000)), False),
        (list(range(512)) * 4, True),
        (list(range(513)) * 4, False),
        ([], False),
    ],
)
def test_loops(tokens: list[int], looping: bool) -> None:
    assert is_looping(tokens) is looping


def test_random_tokens_agree_with_the_definition() -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(150):
        period, repeats = rng.choice([1, 2, 5, 9, 16, 17, 33]), rng.randint(2, 12)
        unit = [rng.randint(0, 2) for _ in range(period)]
        tokens = [rng.randint(0, 9) for _ in range(rng.randint(0, 40))] + unit * repeats
        tokens += [rng.randint(0, 9) for _ in range(rng.randint(0, 20))]
        assert is_looping(tokens) is by_definition(tokens)
        seen.add(is_looping(tokens))
    assert seen == {True, False}


def test_only_the_end_counts_and_texts_are_words() -> None:
    assert not is_looping([1] * 1000 + list(range(WINDOW)))
    assert is_looping(words_of("I think so. " * 30)) and not is_looping(words_of("I think so. " * 3))
    assert looping_share([[1] * 64, [2] * 10]) == 0.5 and looping_share([]) == 0.0
