"""How thoroughly a run checks the checkpoints that it reads: the word `--verify=full|fast` of the command line.

    fast  structure and small files at once; values and checksums of weights when they are first read
    full  everything at once, also the weights that the run would not read

Structure means names, shapes and dtypes of all tensors; values must be finite; checksums are those of the folder's
SHA256SUMS, if it has one. Holds for the process. Needs no torch; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

Verify = Literal["full", "fast"]
WORD = "--verify"

_levels: list[Verify] = ["fast"]


def take_verify(words: Sequence[str]) -> tuple[list[str], Verify]:
    """Take `--verify=LEVEL` or `--verify LEVEL` out of the words of a command line; the last one counts.

    Args:
        words: words after the recipe's name.

    Returns:
        The other words, and the level; `fast` if none is given.

    Raises:
        ValueError: the level is missing or unknown.
    """
    rest: list[str] = []
    level: Verify = "fast"
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name != WORD:
            rest.append(word)
            continue
        level = _level(value if equals else next(remaining, ""))
    return rest, level


def _level(value: str) -> Verify:
    for level in get_args(Verify):
        if value == level:
            return level
    raise ValueError(f"{WORD} must be {' or '.join(get_args(Verify))}, got {value!r}")


@contextmanager
def verifying(level: Verify) -> Iterator[None]:
    """Set the level for the work inside."""
    _levels.append(level)
    try:
        yield
    finally:
        _levels.pop()


def verifies_all() -> bool:
    """Return whether a checkpoint is checked completely when it is opened."""
    return _levels[-1] == "full"
