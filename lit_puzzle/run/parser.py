"""The parser of recipes: a jsonargparse parser with one-line errors that name file, key and the nearest valid key.

Reads and writes nothing.
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, get_args, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from lit_puzzle.run.nulls import nulls
from lit_puzzle.run.parser_errors import one_line
from lit_puzzle.run.recipe import Recipe

CHAT_DATE = "chat_date"


class RecipeParser(ArgumentParser):
    """A jsonargparse parser whose errors are ValueErrors that name the nearest valid key."""

    recipe: Recipe | None = None
    stage: Callable[..., Any] | None = None  # whose parameters the top-level keys are, if a function's
    words: Sequence[str] = ()  # overrides among the arguments that are parsed

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)  # `--model` must not stand for `--models`

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse as jsonargparse does.

        Raises:
            ValueError: an argument that is not accepted, null where a value is needed, or a `${...}` that names no
                value.
        """
        from omegaconf.errors import OmegaConfBaseException  # here, so that `--help` need not wait for it

        if args:
            self.words = [word for word in args[0] if word.startswith("--") and word != "--config"]
        try:
            parsed = super().parse_args(*args, **kwargs)
        except OmegaConfBaseException as error:
            path = "" if self.recipe is None else f"{self.recipe.path}: "
            said = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).splitlines()[0])
            raise ValueError(
                f"{path}{error.full_key}: {said}. A `${{...}}` names a key or an entry of `define`."
            ) from None
        if self.recipe is not None:
            for wrong in nulls(parsed, self.stage):
                raise ValueError(f"{self.recipe.path}: {wrong}")
        return parsed

    def add_date(self) -> None:
        """Add the key of the date that a chat template may read."""
        self.add_argument(
            f"--{CHAT_DATE}",
            type=str,
            default=None,
            help="date that a chat template which reads the clock is given (2026-01-31); default: the run's first day",
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise ValueError with the message, the file that holds the key and the nearest valid one."""
        if self.recipe is None:  # jsonargparse made this one for a nested class: its error reaches the outer one
            super().error(message, ex)
        keys = [action.dest for action in self._actions]
        raise ValueError(f"{self.recipe.path}: {explain(message, self.recipe, keys, self.words)}")


def without_unset_date(config: Namespace) -> Namespace:
    """Return a parsed recipe without its key `chat_date` where that is null: `inputs.json` records the date then."""
    if config[CHAT_DATE] is None:
        config = config.clone()
        config.pop(CHAT_DATE)
    return config


def explain(message: str, recipe: Recipe, parser_keys: Sequence[str], words: Sequence[str] = ()) -> str:
    """Return a parser's message in one line; for an unknown key, where it stands and the nearest valid key.

    Args:
        message: the parser's message.
        recipe: its `class_path`s say which constructor arguments are valid.
        parser_keys: dotted keys that the parser knows by itself.
        words: overrides from the command line.

    Returns:
        One line that names the key and what is wrong with it.
    """
    unknown = re.search(r"(?:[Oo]ption '|unrecognized arguments: --)([\w.]+)", message)
    if unknown is None:
        return one_line(message.removeprefix(f'Parser key "config": {recipe.path}: '))  # where this ran already
    valid = {part for dotted in parser_keys for part in dotted.split(".")} | set(_constructor_arguments(recipe))
    names = unknown[1].split(".")
    top = {dotted.partition(".")[0] for dotted in parser_keys}
    if message.startswith("unrecognized") and names[0] not in top:
        names = names[:1]
    key = next((name for name in names if name not in valid), names[-1])
    holders = [str(file) for file, layer in zip(recipe.files, recipe.layers, strict=True) if key in _all_keys(layer)]
    nearest = difflib.get_close_matches(key, valid - {key}, n=1, cutoff=0.6)
    typed = any(key in word.partition("=")[0].removeprefix("--").split(".") for word in words)
    where = f" in {holders[-1]}" if holders and not typed else ""
    return f"unknown key {key!r}{where}." + (f" Did you mean {nearest[0]!r}?" if nearest else "")


def _all_keys(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _all_keys(child)


def _constructor_arguments(recipe: Recipe) -> Iterator[str]:
    """Yield the names of the arguments of every class that a recipe uses, and of the dataclasses among them."""
    yield from ("class_path", "init_args")
    for class_path in recipe.class_paths():
        module_name, _, class_name = class_path.rpartition(".")
        if not module_name:  # a bare name is one of Lightning's own, whose arguments the parser knows
            continue
        try:
            found = vars(importlib.import_module(module_name))[class_name]
        except (ImportError, KeyError):  # a class path that is wrong as well: it has a message of its own
            continue
        for name, parameter in inspect.signature(found).parameters.items():
            yield name
            yield from _field_names(parameter.annotation)


def _field_names(annotation: Any) -> Iterator[str]:
    """Yield the fields of the dataclasses in a type, and of the dataclasses inside them."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and is_dataclass(kind):
            for field in fields(kind):
                yield field.name
                yield from _field_names(get_type_hints(kind)[field.name])
