"""Finds null in a recipe where a value is needed; jsonargparse lets null through wherever it stands.

Reads and writes nothing.
"""

import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pkgutil import resolve_name
from typing import Any, Union, get_args, get_origin

from jsonargparse import Namespace

from lit_puzzle.run.parser_errors import expected


def nulls(values: Any, owner: Callable[..., Any] | None = None, place: str = "") -> Iterator[str]:
    """Yield a message for every null of a parsed recipe where neither the type nor the default is null.

    Args:
        values: parsed values: a namespace, a list or a single value.
        owner: function or class whose parameters the values are; None where only objects further inside are known.
        place: dotted key of the values.
    """
    if isinstance(values, list):
        for index, value in enumerate(values):
            yield from nulls(value, None, f"{place}[{index}]")
        return
    items = dict(vars(values)) if isinstance(values, Namespace) else {}
    if isinstance(items.get("class_path"), str):
        yield from nulls(items.get("init_args"), resolve_name(items["class_path"]), _join(place, "init_args"))
        return
    hints = {} if owner is None else _hints(owner)
    for name, value in items.items():
        if value is None and name in hints and not _takes_null(hints[name]):
            yield f"{_join(place, name)}: {expected(str(hints[name]), 'null')}"
        yield from nulls(value, _dataclass_in(hints.get(name)), _join(place, name))


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _hints(owner: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of the parameters whose default is not null; none where a type cannot be resolved."""
    try:
        parameters = inspect.signature(owner, eval_str=True).parameters.values()
    except NameError:  # a library whose types are imported for type checkers only
        return {}
    return {
        each.name: each.annotation for each in parameters if each.default is not None and each.annotation != each.empty
    }


def _takes_null(hint: Any) -> bool:
    if hint is Any or hint is object or hint is None or hint is types.NoneType:
        return True
    return any(_takes_null(part) for part in get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else False


def _dataclass_in(hint: Any) -> Callable[..., Any] | None:
    """Return the dataclass that a type is, or that it has beside null."""
    found = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)]
    return found[0] if len(found) == 1 else None
