"""Refuses names of earlier versions in recipes and run folders, with one line that gives the new names.

There are no aliases. The names are in `lit_puzzle.run.renamed_names`. Reads and writes nothing.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_puzzle.run.files import parse_yaml
from lit_puzzle.run.recipe import Recipe
from lit_puzzle.run.renamed_names import KEYS, MODULES, SYMBOLS

PATH = re.compile(r"lit_puzzle(?:\.\w+)+")


def check_names(recipe: Recipe, words: Sequence[str]) -> None:
    """Check that a recipe and its overrides use no name of an earlier version.

    Args:
        recipe: the loaded recipe.
        words: overrides from the command line.

    Raises:
        ValueError: they do; the message gives the new names.
    """
    for file, layer in zip(recipe.files, recipe.layers, strict=True):
        _refuse(str(file), [*_renamed_paths(layer), *_renamed_keys(layer, recipe.value("command"))])
    for word in words:
        _refuse(word.partition("=")[0], _renamed_in_word(word, recipe))


def renamed_in_config(config: str) -> list[str]:
    """Return a sentence for every name of an earlier version in the `config.yaml` of a run folder."""
    content = parse_yaml(config, "config.yaml of the run folder")
    if not isinstance(content, Mapping):  # of somebody else, or of no bytes
        return []
    return [*_renamed_paths(content), *_renamed_keys(content, content.get("command"))]


def _refuse(where: str, renamed: Sequence[str]) -> None:
    if renamed:
        raise ValueError(f"{where}: names of an earlier version: {'; '.join(dict.fromkeys(renamed))}.")


def new_path(path: str) -> str:
    """Return the new name of a dotted path of this package, or the path itself if it was not renamed."""
    name = path.removeprefix("lit_puzzle.")
    for old, new in [*SYMBOLS.items(), *MODULES.items()]:
        if name == old or name.startswith(f"{old}."):
            return f"lit_puzzle.{new}{name.removeprefix(old)}"
    return path


def _renamed_paths(node: Any) -> Iterator[str]:
    """Yield a sentence for every old dotted path among the texts of a recipe."""
    for text in _texts(node):
        for path in PATH.findall(text):
            if new_path(path) != path:
                yield f"{path} is now {new_path(path)}"


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    for child in node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ():
        yield from _texts(child)


def _renamed_keys(layer: Mapping[str, Any], command: object) -> Iterator[str]:
    """Yield a sentence for every old key of a stage, or of an object in the recipe."""
    yield from _renamed_of(str(command), layer, "")
    for place, class_path, arguments in _objects(layer, ""):
        yield from _renamed_of(new_path(class_path), arguments, f"{place}init_args.")


def _objects(node: Any, place: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield where each object with arguments stands, as the prefix of their keys, its class path and the arguments."""
    if isinstance(node, Mapping) and isinstance(node.get("class_path"), str):
        yield place, node["class_path"], node.get("init_args") or {}
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from _objects(child, f"{place}{key}.")


def _renamed_of(owner: str, arguments: Mapping[str, Any], place: str) -> Iterator[str]:
    for old, new in KEYS.get(owner, {}).items():
        for value in _values_at(arguments, old.split(".")):
            # `solver: mip` is now `solver: {name: mip}`; null, a mapping or a `${...}` that can be one is not refused.
            is_new = value is None or isinstance(value, Mapping) or str(value).startswith("${")
            if not (new.startswith(f"{old}.") and is_new):
                yield f"`{place}{old}` is now `{place}{new}`"


def _values_at(arguments: Any, keys: Sequence[str]) -> list[Any]:
    """Return the value at nested keys in a list, which is empty if there is none."""
    for key in keys:
        if not isinstance(arguments, Mapping) or key not in arguments:
            return []
        arguments = arguments[key]
    return [arguments]


def _renamed_in_word(word: str, recipe: Recipe) -> list[str]:
    """Return a sentence for every old name in an override `--key=value`."""
    key, _, text = word.removeprefix("--").partition("=")
    try:
        value = parse_yaml(text, word)
    except ValueError:  # jsonargparse will say so
        value = text
    nested: dict[str, Any] = {}
    for part in reversed(key.removesuffix("+").split(".")):
        nested = {part: nested if nested else value}
    found = [*_renamed_paths(text), *_renamed_keys(nested, recipe.value("command"))]
    for layer in recipe.layers:
        for place, class_path, _ in _objects(layer, ""):
            for arguments in _values_at(nested, [*place.split(".")[:-1], "init_args"]):
                found += _renamed_of(new_path(class_path), arguments, f"{place}init_args.")
    return found
