"""How thoroughly a run checks the checkpoints that it reads: `--verify=fast|full`, or the key `verify` of a recipe.

    fast  structure and small files at once; values and checksums of weights when they are first read
    full  everything at once, also the weights that the run would not read

Structure means names, shapes and dtypes of all tensors; values must be finite; checksums are those of the folder's
SHA256SUMS, if it has one. The level changes no result, so it is not part of the run's config.yaml, and a run can be
resumed with another one. Holds for the process. Needs no torch; reads and writes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

from lit_puzzle.run.recipe import Recipe

Verify = Literal["full", "fast"]
KEY = "verify"

_levels: list[Verify] = ["fast"]


def take_verify(recipe: Recipe, words: Sequence[str]) -> tuple[Recipe, list[str], Verify]:
    """Take `verify` out of a recipe and a command line, which counts more; the last one counts.

    Args:
        recipe: the loaded recipe.
        words: words after the recipe's name; `--verify=LEVEL` or `--verify LEVEL` among them.

    Returns:
        The recipe and the words without it, and the level; `fast` if none is given.

    Raises:
        ValueError: the level is missing or unknown.
    """
    rest: list[str] = []
    stated = recipe.value(KEY)
    level: Verify = "fast" if stated is None else _level(stated, f"{recipe.path}: {KEY}")
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name != f"--{KEY}":
            rest.append(word)
            continue
        level = _level(value if equals else next(remaining, ""), f"--{KEY}")
    layers = tuple({key: value for key, value in layer.items() if key != KEY} for layer in recipe.layers)
    return dataclasses.replace(recipe, layers=layers), rest, level


def _level(value: object, where: str) -> Verify:
    for level in get_args(Verify):
        if value == level:
            return level
    raise ValueError(f"{where} must be {' or '.join(get_args(Verify))}, got {value!r}.")


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
