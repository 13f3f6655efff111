"""Values that a test knows to be there, for the type checker."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """Return a value that is not None."""
    assert value is not None
    return value


def all_present(values: Iterable[T | None]) -> list[T]:
    """Return values of which none is None."""
    return [present(value) for value in values]
