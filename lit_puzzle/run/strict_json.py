"""Validates JSON objects: an unknown or missing key, or a number of the wrong kind, is a ValueError that names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any


def checked_keys(owner: str, data: object, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """Return a JSON object after checking that it has exactly these keys.

    Args:
        owner: name of the object, for the message.
        data: the value that was read.
        required: keys that must be present.
        optional: keys that may be present.

    Raises:
        ValueError: it is not an object, or a key is unknown or missing; the message names it.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{owner}: expected a JSON object, got {type(data).__name__}: {data!r}")
    unknown = sorted(set(data) - {*required, *optional})
    if unknown:
        raise ValueError(f"{owner}: unknown key(s) {unknown}; allowed: {[*required, *optional]}")
    missing = [name for name in required if name not in data]
    if missing:
        raise ValueError(f"{owner}: missing key(s) {missing}; required: {[*required]}")
    return dict(data)


def checked_fields(kind: type, data: object) -> dict[str, Any]:
    """Return the fields of the dataclass `kind` from a JSON object; those with a default may be missing.

    Raises:
        ValueError: it is not an object, or a key is unknown or missing; the message names it.
    """
    fields = dataclasses.fields(kind)
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    return checked_keys(kind.__name__, data, required, [field.name for field in fields if field.name not in required])


def check_whole(owner: str, name: str, value: object, minimum: int) -> None:
    """Check that a value is a whole number of at least `minimum`.

    Raises:
        ValueError: it is not; the message names owner, field and value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{owner}: {name} must be a whole number of at least {minimum}, got {value!r}")
