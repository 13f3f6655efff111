"""Finds and reads recipes (flat YAML files), expands `base:`, and looks up which recipe makes a folder.

Reads YAML files on disk or, if a path does not exist there, the recipes in the installed package.
`base: other.yaml` (a path or a list of paths, relative to the file, else a packaged recipe) names recipes that this one
extends: the files become `--config` arguments, base first, which jsonargparse merges.
`define: {NAME: VALUE}` names values that several keys or recipes share: `${NAME}` stands for the value.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_puzzle.run.files import parse_yaml, read_yaml, resolved
from lit_puzzle.run.references import References

PACKAGED_RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A recipe with its bases.

    Attributes:
        path: the file that the user named.
        layers: content of each file, base first, the recipe itself last, without `base` and `define`.
        files: the file of each layer, for messages.
    """

    path: Path
    layers: tuple[dict[str, Any], ...]
    files: tuple[Path, ...]

    def value(self, key: str) -> Any:
        """Return the value of a top-level key in the last file that has it, or None."""
        return next((layer[key] for layer in reversed(self.layers) if key in layer), None)

    def class_paths(self) -> set[str]:
        """Return every class path in the files."""
        return {path for layer in self.layers for path in _class_paths(layer)}

    def config_arguments(self, words: Sequence[str] = ()) -> list[str]:
        """Return the layers as repeated `--config` arguments, base first, with YAML text instead of files.

        A list replaces the same list of an earlier layer. jsonargparse would merge them item by item, so a list that
        occurs again is left out of the earlier layers.

        Args:
            words: overrides from the command line, which come after all layers.
        """
        later = [_nested(word.partition("=")[0], []) for word in words if word.partition("=")[2].startswith("[")]
        layers: list[dict[str, Any]] = []
        for layer in reversed(self.layers):
            layers.insert(0, _without_lists_of(layer, later))
            later.append(layer)
        texts = [yaml.safe_dump(layer, sort_keys=False) for layer in layers]
        return [argument for text in texts for argument in ("--config", text)]

    def arguments(self, words: Sequence[str]) -> list[str]:
        """Return what a parser reads: the layers, then the overrides.

        An override `--a.b=null` becomes a layer of its own: of a value that may be settings or null, jsonargparse takes
        null from a file only.

        Args:
            words: overrides from the command line.

        Raises:
            ValueError: an override without a value.
        """
        arguments = self.config_arguments(words)
        for word in words:
            key, given, value = word.partition("=")
            if given and not value:
                raise ValueError(f"{word} has no value. Give one, or leave the word out; {word}null stands for null.")
            if key == "--config":
                arguments += [key, yaml.safe_dump(_read_mapping(Path(value)), sort_keys=False)]
                continue
            nothing = "." in key and value in ("null", "~")
            arguments += ["--config", yaml.safe_dump(_nested(key, None))] if nothing else [word]
        return arguments

    def on_disk(self, config: str, words: Sequence[str]) -> str:
        """Return a resolved recipe as it is written to disk: references to environment variables stay references.

        Args:
            config: the resolved recipe as YAML text.
            words: overrides from the command line.

        Raises:
            ValueError: a number is NaN.
        """
        references = self.references(words)
        if ".nan" not in config.lower() and not references:
            return config
        content = parse_yaml(config, str(self.path))
        for key, value in _numbers(content, ""):
            if math.isnan(value):
                raise ValueError(f"{self.path}: {key} is NaN, which is not a number. Give a number.")
        return yaml.safe_dump(references.restore(content), sort_keys=False) if references else config

    def references(self, words: Sequence[str]) -> References:
        """Return the references to environment variables in the files and overrides."""
        pairs = (word.lstrip("-").partition("=") for word in words)
        return References([*self.layers, *({key.rpartition(".")[2]: value} for key, _, value in pairs)])


def _numbers(node: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _numbers(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _numbers(value, f"{key}.{index}")
    elif isinstance(node, float):
        yield key, node


def _class_paths(node: Any) -> Iterator[str]:
    if isinstance(node, dict) and isinstance(node.get("class_path"), str):
        yield node["class_path"]
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _class_paths(child)


def _nested(word: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for the word `--a.b`."""
    first, *rest = word.removeprefix("--").split(".", 1)
    return {first: _nested(rest[0], value) if rest else value}


def _without_lists_of(node: dict[str, Any], later: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a mapping without the lists that one of the later mappings has at the same place."""
    kept: dict[str, Any] = {}
    for key, value in node.items():
        again = [mapping[key] for mapping in later if key in mapping]
        if isinstance(value, dict):
            kept[key] = _without_lists_of(value, [item for item in again if isinstance(item, dict)])
        elif not (isinstance(value, list) and any(isinstance(item, list) for item in again)):
            kept[key] = value
    return kept


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: the given path, or the packaged recipe of that name.

    Raises:
        ValueError: neither exists; the message names the most similar packaged recipe.
    """
    given = Path(name)
    if given.is_file():
        return given
    packaged = _packaged(given)
    if packaged is not None:
        return packaged
    known = [str(Path("recipes") / path) for path in packaged_recipes()]
    nearest = difflib.get_close_matches(str(Path("recipes") / given.with_suffix(".yaml").name), known, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(
        f"There is no recipe {name!r}, on disk or in the package.{hint} `lightning recipes` lists the packaged ones."
    )


def _packaged(given: Path) -> Path | None:
    """Return the file of a packaged recipe, named with or without the folder `recipes`, or None."""
    relative = given.relative_to("recipes") if given.parts[:1] == ("recipes",) else given
    packaged = PACKAGED_RECIPES / relative
    return packaged if not given.is_absolute() and ".." not in given.parts and packaged.is_file() else None


def packaged_recipes() -> list[Path]:
    """Return paths of all packaged recipes, relative to the recipes folder; files without a command are bases only."""
    paths = sorted(PACKAGED_RECIPES.rglob("*.yaml"))
    return [path.relative_to(PACKAGED_RECIPES) for path in paths if load_recipe(str(path)).value("command")]


def load_recipe(name: str) -> Recipe:
    """Read a recipe and everything that its `base:` names, with the values of `define:` in their places.

    Raises:
        ValueError: a file is missing or no YAML mapping, `base:` runs in a loop, or `define:` is no mapping.
    """
    path = find_recipe(name)
    found: list[tuple[Path, dict[str, Any]]] = []
    _expand(path, (), found)
    defined: dict[str, Any] = {}
    for file, layer in found:
        values = layer.pop("define", {})
        if not isinstance(values, dict):
            raise ValueError(f"{file}: `define` must be a mapping of names to values, got {values!r}.")
        defined |= values
    layers = (_with_values(layer, defined) for _, layer in found)
    return Recipe(path, tuple(layers), tuple(file for file, _ in found))


def _with_values(node: Any, defined: Mapping[str, Any]) -> Any:
    """Return a copy of a node in which each text `${NAME}` of a defined name is replaced by the value."""
    if isinstance(node, dict):
        return {key: _with_values(value, defined) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_values(value, defined) for value in node]
    if isinstance(node, str) and node.startswith("${") and node[2:-1] in defined:
        return deepcopy(defined[node[2:-1]])
    return node


def _expand(path: Path, above: tuple[Path, ...], found: list[tuple[Path, dict[str, Any]]]) -> None:
    real = resolved(path)
    if real in above:
        chain = " -> ".join(file.name for file in (*above[above.index(real) :], real))
        raise ValueError(f"`base:` runs in a loop: {chain}. Remove one of these lines.")
    layer = _read_mapping(path)
    bases = layer.pop("base", [])
    for base in [bases] if isinstance(bases, str) else bases:
        base_path = path.parent / base
        if not base_path.is_file():
            packaged = _packaged(Path(base))
            if packaged is None:
                raise ValueError(
                    f"{path} says `base: {base}`, but {base_path} does not exist, and no packaged recipe has this name."
                )
            base_path = packaged
        _expand(base_path, (*above, real), found)
    found.append((path, layer))


def _read_mapping(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a YAML mapping of keys to values, but it contains {type(content).__name__}.")
    return content


def recipe_that_makes(folder: Path) -> str | None:
    """Return the packaged recipe whose run folder contains `folder`, as typed on the command line, or None."""
    folders = (resolved(folder), *resolved(folder).parents)
    for path in sorted(PACKAGED_RECIPES.rglob("*.yaml")):
        found = re.search(r"^run_dir: *(\S+)", path.read_text(), re.MULTILINE)  # parsing all of them takes 0.3 seconds
        if found and resolved(Path(found[1])) in folders:
            return str(Path("recipes") / path.relative_to(PACKAGED_RECIPES))
    return None
