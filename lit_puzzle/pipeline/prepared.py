"""A pipeline's recipe made ready for the parser: paths of stage recipes, and `overrides` merged by stage and key.

    --overrides.distill.trainer.max_steps=100    the stage, then the key of its recipe

Overrides of a `base:` hold where the recipe or the command line says nothing else. Reads and writes nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_puzzle.run.files import parse_yaml
from lit_puzzle.run.recipe import PACKAGED_RECIPES, Recipe

KEY = "overrides"


def prepared(recipe: Recipe, words: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Return a pipeline's recipe and the words for its parser.

    Args:
        recipe: the loaded recipe.
        words: overrides from the command line.

    Returns:
        The recipe with paths of stage recipes that lead there from here, and all `overrides` in its last layer; the
        words without those that belong to stages.

    Raises:
        ValueError: overrides of a wrong form.
    """
    merged: dict[str, dict[str, Any]] = {}
    layers = []
    for file, layer in zip(recipe.files, recipe.layers, strict=True):
        entries = layer.get("stages")
        if isinstance(entries, list):
            layer = layer | {"stages": [_located(entry, file) for entry in entries]}
        _merge(merged, layer.get(KEY), str(file))
        layers.append({key: value for key, value in layer.items() if key != KEY})
    rest = []
    for word in words:
        if word.startswith((f"--{KEY}=", f"--{KEY}.")) or word == f"--{KEY}":
            _merge(merged, _stage_override(word), word)
        else:
            rest.append(word)
    if merged:
        layers[-1] = layers[-1] | {KEY: merged}
    return dataclasses.replace(recipe, layers=tuple(layers)), rest


def _located(entry: Any, file: Path) -> Any:
    """Return an entry whose recipe, if it lies beside the pipeline's file, is named from here."""
    entry = {"recipe": entry} if isinstance(entry, str) else entry
    name = entry.get("recipe") if isinstance(entry, Mapping) else None
    if not isinstance(name, str) or not (file.parent / name).is_file():
        return entry
    beside = file.parent / name
    packaged = beside.is_relative_to(PACKAGED_RECIPES)
    path = Path("recipes") / beside.relative_to(PACKAGED_RECIPES) if packaged else Path(os.path.normpath(beside))
    return {**entry, "recipe": str(path)}


def _merge(merged: dict[str, dict[str, Any]], content: Any, where: str) -> None:
    if content is None:
        return
    if not isinstance(content, Mapping) or not all(isinstance(value, Mapping) for value in content.values()):
        raise ValueError(f"{where}: {KEY} is a mapping of stages, each of keys to values, got {content!r}.")
    for stage, values in content.items():
        merged[str(stage)] = merged.get(str(stage), {}) | dict(values)


def _stage_override(word: str) -> dict[str, Any]:
    name, given, text = word.partition("=")
    parts = name.removeprefix("--").split(".", 2)
    if not given or not text:
        raise ValueError(f"{word} has no value. An override of a stage is --{KEY}.STAGE.KEY=VALUE.")
    value = parse_yaml(text, word)
    for part in reversed(parts[1:]):
        value = {part: value}
    return dict(value) if isinstance(value, Mapping) else {"": value}
