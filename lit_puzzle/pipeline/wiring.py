"""How the stages of a pipeline find each other: overrides that lead inputs to the folders of its stages.

Reads nothing but whether an input is there; writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_puzzle.run.files import to_json
from lit_puzzle.run.recipe import recipe_that_makes
from lit_puzzle.run.recipe_values import plain, texts_in

OWN_KEYS = ("run_dir", "save_dir", "dirpath", "default_root_dir")  # where a stage writes


def override_word(key: str, value: Any) -> str:
    """Return the override of a key, as typed on the command line."""
    return f"--{key}={value if isinstance(value, str) else to_json(value, None)}"


def plain_value(value: Any) -> Any:
    """Return nested values as JSON can hold them."""
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_value(item) for item in value]
    value = plain(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def wire(
    values: Mapping[str, Any], standing: Mapping[str, str], run_dir: Path, stands: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the overrides that lead inputs to stages of this pipeline, and the names of these stages.

    Args:
        values: of the recipe of one stage, with its run folder in this pipeline.
        standing: run folder that recipes name -> the stage that it stands for.
        run_dir: folder of the pipeline.
        stands: the folder that stands for the stage itself.

    Raises:
        ValueError: the stage reads its own folder, or one that no stage makes and that is not there.
    """
    words: list[str] = []
    reads: dict[str, None] = {}
    for key, value in _inputs(values, ""):
        for text in texts_in(value):
            folder = _stage_of(text, standing)
            if folder is None:
                _check_there(key, text)
            elif folder == stands:
                raise ValueError(f"{key} is {text}, the stage's own folder.")
            else:
                reads[standing[folder]] = None
        placed = _placed(value, standing, run_dir)
        if placed != value:
            words.append(override_word(key, placed))
    return tuple(words), tuple(reads)


def _inputs(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield every text and list of a recipe that a word can override, with its dotted key."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name not in OWN_KEYS:
                yield from _inputs(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list | str | Path):
        yield key, plain_value(node)


def _stage_of(text: str, standing: Mapping[str, str]) -> str | None:
    """Return the folder of `standing` that a text is, or lies in, or None."""
    return next((folder for folder in standing if text == folder or text.startswith(f"{folder}/")), None)


def _placed(value: Any, standing: Mapping[str, str], run_dir: Path) -> Any:
    """Return a value with the folders of this pipeline in place of those that recipes name."""
    if isinstance(value, Mapping):
        return {key: _placed(item, standing, run_dir) for key, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, standing, run_dir) for item in value]
    folder = _stage_of(value, standing) if isinstance(value, str) else None
    return value if folder is None else f"{run_dir / standing[folder]}{value.removeprefix(folder)}"


def _check_there(key: str, text: str) -> None:
    if "\n" in text or len(text) > 1000 or not text.startswith("runs/") or Path(text).exists():
        return
    maker = recipe_that_makes(Path(text))
    hint = f" Add a stage with {maker}, or make it first: lightning run {maker}" if maker else ""
    raise ValueError(f"{key} is {text}, which no stage makes and which is not there.{hint}")
