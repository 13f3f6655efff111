"""The value of every key of a recipe, defaults included, without importing what the recipe runs.

Merges the layers of a recipe (base first) and the overrides as the parser does: settings field by field, objects by
`class_path` (arguments that another class does not take are dropped), a `dict` or a list as a whole. Then fills in
defaults from the source (`lit_puzzle.run.source_defaults`) and resolves `${...}`. A test holds that the values are
those of the parser for every packaged recipe. Reads the environment variables that a recipe names; writes nothing.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_puzzle.run.files import parse_yaml
from lit_puzzle.run.recipe import Recipe
from lit_puzzle.run.source_defaults import PACKAGE, REQUIRED, Parameter, is_dataclass, parameters_of

REFERENCE = re.compile(r"\$\{([^${}]+)\}")
LIGHTNING_KEYS = ("model", "data")  # objects of a command of Lightning; `trainer` has the keys of its Trainer


@dataclass(frozen=True)
class Values:
    """The values of a recipe.

    Attributes:
        content: nested plain values; an object is `{"class_path", "init_args"}`.
        place: dotted key where they stand in the recipe, for messages and overrides; empty at the top.
    """

    content: Mapping[str, Any]
    place: str = ""

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value at a dotted key, or the default where a key of the path does not exist."""
        value: Any = self.content
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    def at(self, key: str) -> Any:
        """Return the value at a dotted key.

        Raises:
            ValueError: the recipe has no such key.
        """
        value = self.get(key, REQUIRED)
        if value is REQUIRED:
            raise ValueError(f"{self.key(key)} is missing in the recipe, and has no default.")
        return value

    def whole(self, key: str, least: int = 0) -> int:
        """Return a whole number.

        Raises:
            ValueError: it is none, or below `least`.
        """
        value = self.at(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{self.key(key)} is {value!r}; a whole number of at least {least} is needed.")
        return value

    def path(self, key: str) -> Path:
        """Return the path of a file or folder.

        Raises:
            ValueError: the value is no text.
        """
        value = self.at(key)
        if not isinstance(value, str) or not value:
            raise ValueError(f"{self.key(key)} is {value!r}; a path is needed.")
        return Path(value)

    def number(self, key: str) -> float:
        """Return a number.

        Raises:
            ValueError: it is none.
        """
        value = self.at(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.key(key)} is {value!r}; a number is needed.")
        return float(value)

    def inside(self, key: str) -> Values:
        """Return the values below a dotted key; none where it is null."""
        return Values(self.at(key) or {}, self.key(key))

    def key(self, key: str) -> str:
        """Return the dotted key from the top of the recipe."""
        return f"{self.place}.{key}" if self.place else key


def recipe_values(recipe: Recipe, words: Sequence[str], target: str | None) -> Values:
    """Return the values of a recipe and its overrides.

    Args:
        recipe: the loaded recipe.
        words: overrides `--key=value`.
        target: dotted name of the stage's function; None for a command of Lightning.

    Raises:
        ValueError: a key that is not taken, or a `${...}` that names no value.
    """
    layers: list[Mapping[str, Any]] = [*recipe.layers, *(_override(word) for word in words)]
    found: dict[str, Any] = {}
    for key in dict.fromkeys(name for layer in layers for name in layer):
        found[key] = [layer[key] for layer in layers if key in layer]
    if target is None:
        merged = {
            key: _object(values, key) if key in LIGHTNING_KEYS else _plain(values) for key, values in found.items()
        }
    else:
        own = {key: _plain(found.pop(key)) for key in ("command", "run_dir", "verify", "chat_date") if key in found}
        merged = own | _filled(parameters_of(target) or {}, found, "")
    return Values({key: _resolved(value, merged, ()) for key, value in merged.items()})


def _override(word: str) -> dict[str, Any]:
    key, given, text = word.removeprefix("--").partition("=")
    value: Any = parse_yaml(text, word) if given and text not in ("", "~") else None
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _plain(values: Sequence[Any]) -> Any:
    """Merge values of unknown type: mappings key by key, `key+` appends to a list, all else replaces."""
    merged: Any = None
    for value in values:
        if not isinstance(value, Mapping):
            merged = value
            continue
        merged = dict(merged) if isinstance(merged, Mapping) else {}
        for key, item in value.items():
            name = key.removesuffix("+")
            if name != key:
                merged[name] = [*(merged.get(name) or []), *(item if isinstance(item, list) else [item])]
            else:
                merged[name] = _plain([merged[name], item] if name in merged else [item])
    return merged


def _object(values: Sequence[Any], place: str) -> Any:
    """Merge values of an object: a class path, or a mapping with `class_path`, `init_args`, or arguments directly."""
    class_path: Any = None
    arguments: list[dict[str, Any]] = []
    for value in values:
        if not isinstance(value, Mapping):
            value = {"class_path": value} if isinstance(value, str) else None
        if value is None:
            class_path, arguments = None, []
            continue
        given = value.get("class_path", class_path)
        if given != class_path:
            taken = parameters_of(given) if isinstance(given, str) else None
            arguments = [{k: v for k, v in part.items() if taken is None or k in taken} for part in arguments]
            class_path = given
        direct = {k: v for k, v in value.items() if k not in ("class_path", "init_args", "dict_kwargs")}
        arguments.append(direct | dict(value.get("init_args") or {}))
    if class_path is None:
        return None if not arguments else {"init_args": _plain(arguments)}
    known = parameters_of(class_path)
    by_name = {key: [part[key] for part in arguments if key in part] for part in arguments for key in part}
    if known is None:
        return {"class_path": class_path, "init_args": {key: _plain(found) for key, found in by_name.items()}}
    return {"class_path": class_path, "init_args": _filled(known, by_name, f"{place}.init_args.")}


def _filled(known: Mapping[str, Parameter], given: Mapping[str, Sequence[Any]], place: str) -> dict[str, Any]:
    """Return the value of every parameter, from the values given in order or its default."""
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"unknown key {place + key!r}.{hint}")
    values = {}
    for key, parameter in known.items():
        start = [] if parameter.default is REQUIRED else [parameter.default]
        found = [*start, *given.get(key, [])]
        if found:
            values[key] = _typed(parameter, found, place + key)
    return values


def _typed(parameter: Parameter, values: Sequence[Any], place: str) -> Any:
    """Merge the values of one parameter by its type."""
    if not isinstance(values[-1], Mapping | str) or parameter.is_mapping:
        return _items(values[-1], place)
    last = len(values) - next((i for i, v in enumerate(reversed(values)) if not isinstance(v, Mapping)), len(values))
    settings = next((kind for kind in parameter.kinds if is_dataclass(kind)), None)
    if settings is not None and isinstance(values[-1], Mapping) and "class_path" not in values[-1]:
        parts = [dict(value) for value in values[last:]]
        by_name = {key: [part[key] for part in parts if key in part] for part in parts for key in part}
        return _filled(parameters_of(settings) or {}, by_name, f"{place}.")
    names_class = isinstance(values[-1], str) and values[-1].startswith(f"{PACKAGE}.") and parameters_of(values[-1])
    if isinstance(values[-1], Mapping) or (names_class and parameter.kinds != ("str",)):
        return _object(values, place)
    return values[-1]


def _items(value: Any, place: str) -> Any:
    """Fill in the defaults of objects in a list."""
    if not isinstance(value, list):
        return value
    return [_object([item], place) if isinstance(item, Mapping) and "class_path" in item else item for item in value]


def _resolved(value: Any, top: Mapping[str, Any], above: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _resolved(item, top, above) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, top, above) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    whole = REFERENCE.fullmatch(value)
    if whole:
        return _looked_up(whole[1], top, above)
    return REFERENCE.sub(lambda match: str(_looked_up(match[1], top, above)), value)


def _looked_up(name: str, top: Mapping[str, Any], above: tuple[str, ...]) -> Any:
    if name.startswith("oc.env:"):
        variable, _, default = name.removeprefix("oc.env:").partition(",")
        return os.environ.get(variable.strip(), default.strip())
    found = Values(top).get(name, REQUIRED)
    if found is REQUIRED or name in above:
        raise ValueError(f"${{{name}}} names no value. A `${{...}}` names a key or an entry of `define`.")
    return _resolved(found, top, (*above, name))


def plain(value: Any) -> Any:
    """Return a value with paths as text, as YAML has them."""
    return str(value) if isinstance(value, Path) else value


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text in nested values."""
    if isinstance(value, str):
        yield value
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for item in inside:
        yield from texts_in(item)
