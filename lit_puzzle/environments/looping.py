"""Defines when a completion is looping: it ends in a run of one repeated n-gram. Every report uses this definition.

Let x be the tokens (ids, or words of a text) and n the period. The run of period n at the end of x is the longest
suffix in which x[i] = x[i - n]. A completion is looping if for some n <= 512 its final run, the first n-gram included,
has at least `MIN_REPEATS` n-grams and at least `MIN_TOKENS` tokens:

    run(n) + n >= max(MIN_REPEATS * n, MIN_TOKENS),      run(n) = max {r : x[i] = x[i - n] for the last r tokens i}

Up to `MAX_TAIL` tokens at the very end do not count, so that an end token, or a last half sentence after a loop, hides
nothing. A text of one word repeated 64 times is looping; a table whose rows repeat twice is not.

Reads and writes nothing. Needs no torch. Time: 512 comparisons of arrays of `WINDOW` tokens, about 6 ms.
"""

from collections.abc import Sequence

import numpy

MAX_PERIOD = 512  # tokens of the longest repeated n-gram
MIN_REPEATS = 4
MIN_TOKENS = 64
MAX_TAIL = 16  # tokens after the loop
WINDOW = MAX_PERIOD * MIN_REPEATS + MAX_TAIL  # only the end of a completion is looked at


def is_looping(tokens: Sequence[int] | Sequence[str]) -> bool:
    """Return whether a completion ends in a loop.

    Args:
        tokens: token ids, end token included or not, or words (`words_of`).
    """
    if len(tokens) < MIN_TOKENS:
        return False
    _, numbers = numpy.unique(numpy.asarray(tokens[-WINDOW:]), return_inverse=True)
    return any(_ends_in_run(numbers, period) for period in range(1, min(MAX_PERIOD, len(numbers) // MIN_REPEATS) + 1))


def _ends_in_run(numbers: numpy.ndarray, period: int) -> bool:
    """Return whether a run of the period is long enough and ends within `MAX_TAIL` tokens of the end."""
    different = numpy.flatnonzero(numbers[period:] != numbers[:-period])
    needed = max(MIN_REPEATS * period, MIN_TOKENS) - period
    borders = numpy.concatenate([[-1], different, [len(numbers) - period]])
    starts, ends = borders[:-1] + 1, borders[1:]  # runs of equality, ends excluded
    return bool(((ends - starts >= needed) & (ends >= len(numbers) - period - MAX_TAIL)).any())


def words_of(text: str) -> list[str]:
    """Return the words of a text, for completions whose tokens are not at hand."""
    return text.split()


def looping_share(completions: Sequence[Sequence[int]] | Sequence[Sequence[str]]) -> float:
    """Return the share of completions that are looping; 0 where there are none."""
    return sum(is_looping(tokens) for tokens in completions) / len(completions) if completions else 0.0
