"""The stages of a pipeline: which recipe each one runs, with which overrides, and which earlier stages it reads.

A recipe names the inputs of its stage by the run folders of other recipes (`library: runs/library`). In a pipeline with
a stage of this name, such a text means that stage's folder, RUN/library: it is replaced by an override. The folder that
stands for a stage is the run folder of its recipe with the stage's name in place of the last part.

Reads recipes and the source of what they run (`recipe_values`); imports no torch and writes nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lit_puzzle.pipeline.grid import expanded
from lit_puzzle.pipeline.wiring import override_word, plain_value, wire
from lit_puzzle.run.commands import PIPELINE, command_of, is_own, target_of
from lit_puzzle.run.recipe import Recipe, find_recipe, load_recipe
from lit_puzzle.run.recipe_values import recipe_values

NAME = re.compile(r"[A-Za-z0-9_][\w-]*")


@dataclass(frozen=True)
class Entry:
    """A stage as a pipeline's recipe names it.

    Attributes:
        recipe: path of the stage's recipe, beside the pipeline's recipe or packaged.
        name: of the stage and its folder; empty: the last part of its recipe's run folder.
        overrides: dotted key -> value, what `--key=value` would be.
        needs: file without which the stage is left out, or runs with `otherwise`; None: none is needed.
        otherwise: overrides for a machine that lacks `needs`; None: the stage is left out there.
        print_output: whether all that the stage prints is printed, too.
    """

    recipe: str
    name: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None
    otherwise: Mapping[str, Any] | None = None
    print_output: bool = False


@dataclass(frozen=True)
class Stage:
    """A stage, ready to run.

    Attributes:
        name: of the stage.
        entry: what the pipeline's recipe says of it.
        recipe: the loaded recipe.
        command: of the recipe.
        folder: its run folder.
        words: overrides in their order, without those of `wired`.
        wired: overrides that lead inputs to the folders of earlier stages.
        values: all values of the recipe, with the run folders that recipes name.
        reads: names of the stages that it reads.
        left_out: why it does not run on this machine; empty: it does.
    """

    name: str
    entry: Entry
    recipe: Recipe
    command: str
    folder: Path
    words: tuple[str, ...]
    wired: tuple[str, ...]
    values: Mapping[str, Any]
    reads: tuple[str, ...]
    left_out: str = ""

    @property
    def arguments(self) -> list[str]:
        """The words after `lightning run`."""
        return [self.entry.recipe, f"--run_dir={self.folder}", *self.words, *self.wired]


def read_stages(run_dir: Path, entries: Any, overrides: Any) -> list[Stage]:
    """Return the stages of a pipeline in their order.

    Args:
        run_dir: folder of the pipeline.
        entries: list of mappings, each an `Entry`.
        overrides: stage -> dotted key -> value, on top of those of the entries.

    Raises:
        ValueError: a recipe that is missing or wrong, doubled names, an unknown key, a stage that reads one that does
            not run before it, or an input that no stage makes and that is not there.
    """
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"stages is {entries!r}; a list of stages is needed, each with the `recipe` that it runs.")
    found = [entry for place, content in enumerate(entries, 1) for entry in _entries(content, place)]
    recipes = [load_recipe(entry.recipe) for entry in found]
    standing = _standing_for(found, recipes)
    _check_overrides(overrides, standing)
    stages = []
    for entry, recipe, (name, folder) in zip(found, recipes, standing.items(), strict=True):
        extra = _mapping(overrides.get(name, {}), f"overrides.{name}")
        stages.append(_stage(run_dir, name, folder, entry, recipe, extra, standing))
    _check_order(stages)
    return _without_left_out(stages)


def _entries(content: Any, place: int) -> list[Entry]:
    where = f"stages, number {place}"
    content = {"recipe": content} if isinstance(content, str) else _mapping(content, where)
    return [_entry(each, where) for each in expanded(content, where)]


def _entry(content: dict[str, Any], where: str) -> Entry:
    known = [field.name for field in fields(Entry)]
    for key in content:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}. A stage has {', '.join(known)}, each.")
    if not isinstance(content.get("recipe"), str):
        raise ValueError(f"{where}: recipe is {content.get('recipe')!r}; the path of a recipe is needed.")
    try:
        find_recipe(content["recipe"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    entry = Entry(**content)
    if entry.name and not (isinstance(entry.name, str) and NAME.fullmatch(entry.name)):
        raise ValueError(f"{where}: name is {entry.name!r}; it is made of letters, digits, _ and -.")
    _mapping(entry.overrides, f"{where}: overrides")
    if not isinstance(entry.needs, str | None) or not isinstance(entry.print_output, bool):
        raise ValueError(
            f"{where}: needs is a path and print_output true or false, got {entry.needs!r}, {entry.print_output!r}."
        )
    if entry.otherwise is not None:
        _mapping(entry.otherwise, f"{where}: otherwise")
    return entry


def _mapping(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{where} is {content!r}; a mapping of keys to values is needed.")
    return dict(content)


def _standing_for(entries: Sequence[Entry], recipes: Sequence[Recipe]) -> dict[str, str]:
    """Return name -> the folder that stands for the stage in recipes."""
    found: dict[str, str] = {}
    for entry, recipe in zip(entries, recipes, strict=True):
        run_dir = recipe.value("run_dir")
        if not isinstance(run_dir, str):
            raise ValueError(f"{entry.recipe} has no run_dir: it can be the `base:` of other recipes only.")
        name = entry.name or Path(run_dir).name
        if name in found:
            raise ValueError(f"two stages are called {name!r}; give one of them another `name`.")
        found[name] = str(Path(run_dir).parent / name)
    return found


def _check_overrides(overrides: Any, standing: Mapping[str, str]) -> None:
    for name in _mapping(overrides, "overrides"):
        if name not in standing:
            raise ValueError(f"overrides names the stage {name!r}; there are {', '.join(standing)}.")


def _stage(
    run_dir: Path,
    name: str,
    stands: str,
    entry: Entry,
    recipe: Recipe,
    extra: Mapping[str, Any],
    standing: Mapping[str, str],
) -> Stage:
    lacks = entry.needs is not None and not Path(entry.needs).exists()
    reason = f"{entry.needs} is not there" if lacks and entry.otherwise is None else ""
    given = {**entry.overrides, **((entry.otherwise or {}) if lacks else {}), **extra}
    if "run_dir" in given:
        raise ValueError(f"stage {name!r}: run_dir is {run_dir / name}, the pipeline's; give the stage a `name`.")
    words = tuple(override_word(key, value) for key, value in given.items())
    command, folder = command_of(recipe, words), run_dir / name
    if command == PIPELINE:
        raise ValueError(f"stage {name!r}: {entry.recipe} is a pipeline itself; name its stages here.")
    try:
        target = target_of(command) if is_own(command) else None  # keys of a user's function are not known here
        values = recipe_values(recipe, words, target).content
        placed = recipe_values(recipe, [*words, f"--run_dir={folder}"], target).content
        wired, reads = wire(placed, {text: other for other, text in standing.items()}, run_dir, stands)
    except ValueError as error:
        raise ValueError(f"stage {name!r} ({entry.recipe}): {error}") from error
    content = {"recipe": entry.recipe, "values": _without_run_dir(values)}
    return Stage(name, entry, recipe, command, folder, words, wired, content, reads, reason)


def _without_run_dir(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: plain_value(value) for key, value in values.items() if key != "run_dir"}


def _check_order(stages: Sequence[Stage]) -> None:
    """Check that every stage reads earlier ones only."""
    by_name = {stage.name: stage for stage in stages}
    before: set[str] = set()
    for stage in stages:
        for name in stage.reads:
            if name not in before:
                circle = _path(by_name, name, stage.name, ())
                if circle:
                    raise ValueError(f"stages read each other in a circle: {' <- '.join([stage.name, *circle])}.")
                raise ValueError(f"stage {stage.name!r} reads the stage {name!r}, which comes after it; move it up.")
        before.add(stage.name)


def _path(stages: Mapping[str, Stage], start: str, goal: str, above: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names from one stage to another that it reads, directly or not; empty if it does not."""
    if start == goal:
        return (*above, goal)
    if start in above:
        return ()
    found = (_path(stages, name, goal, (*above, start)) for name in stages[start].reads)
    return next((path for path in found if path), ())


def _without_left_out(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages in which those that read a stage that is left out are left out, too."""
    out: set[str] = set()
    found = []
    for stage in stages:
        missing = [name for name in stage.reads if name in out]
        if missing and not stage.left_out:
            stage = dataclasses.replace(stage, left_out=f"it reads {missing[0]}, which is left out")
        if stage.left_out:
            out.add(stage.name)
        found.append(stage)
    return found
