"""Messages about wrong values in a recipe: one line with the key, what is allowed and what was given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
import yaml
from jsonargparse import ActionConfigFile

from lit_puzzle.run.parser import RecipeParser
from lit_puzzle.run.recipe import load_recipe

HERE = __name__


@dataclass(frozen=True)
class Size:
    """Settings that a larger one holds."""

    rows: int
    kind: Literal["flat", "tall"] = "flat"


@dataclass(frozen=True)
class Settings:
    """Settings of the stage."""

    size: Size = field(default_factory=lambda: Size(1))
    rate: float | None = None


@dataclass(frozen=True)
class Pace:
    """Settings that need no value."""

    steps: int = 1


class Tool:
    """An object of a recipe."""

    def __init__(self, name: str, count: int = 1, mode: Literal["on", "off"] = "on", size: Size = Size(2)) -> None:
        pass


class Other(Tool):
    """Another one."""

    def __init__(self, name: str, inner: Tool | None = None, pace: Pace = Pace()) -> None:
        pass


class Scores(Protocol):
    """What a recipe can fill in by a class."""

    def score(self, value: float) -> float:
        """Return the score."""
        ...


class Squares:
    """Such a class."""

    def __init__(self, power: int = 2) -> None:
        pass

    def score(self, value: float) -> float:
        """Return the score."""
        return value


class Built:
    """What a callable of a recipe makes."""

    def __init__(self, rows: list[int], power: int = 2) -> None:
        pass


def stage(
    run_dir: Path,
    source: Path,
    settings: Settings = Settings(),
    mode: Literal["slow", "fast"] = "slow",
    counts: int | list[int] | None = None,
    sizes: list[Size] | None = None,
    weights: Mapping[str, float] | None = None,
) -> None:
    """A stage with values."""


def objects(
    tool: Tool | None = None,
    tools: list[Tool] | None = None,
    scores: Scores | None = None,
    build: Callable[[list[int]], Built] = Built,
) -> None:
    """More arguments of the stage, which are objects."""


def refusal(tmp_path: Path, *words: str, **content: Any) -> str:
    """Return the message about a recipe with these keys and overrides, without the recipe's path in front."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"run_dir": "run", "source": "here"} | content))
    recipe = load_recipe(str(file))
    parser = RecipeParser(parser_mode="omegaconf+")
    parser.recipe, parser.stage = recipe, stage
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_function_arguments(stage)
    parser.add_function_arguments(objects)
    with pytest.raises(ValueError, match=r"^\S+recipe.yaml: [^\n]+$") as caught:
        parser.parse_args(recipe.arguments(words))
    return str(caught.value).removeprefix(f"{file}: ")


TOOL, OTHER, SQUARES, BUILT = (f"{HERE}.{name}" for name in ("Tool", "Other", "Squares", "Built"))
CASES = [
    ({"mode": "warp"}, "mode: expected slow or fast, got warp"),
    ({"counts": "many"}, "counts: expected int, list[int] or null, got many"),
    ({"counts": [1, "x"]}, "counts: expected int, list[int] or null, got [1, 'x']"),
    ({"settings": "big"}, "settings: expected a mapping of keys to values, got big"),
    ({"settings": {"rate": "fast"}}, "settings.rate: expected float or null, got fast"),
    ({"settings": {"size": {"rows": "x"}}}, "settings.size.rows: expected int, got x"),
    ({"settings": {"size": {"rows": 1, "kind": "x"}}}, "settings.size.kind: expected flat or tall, got x"),
    ({"weights": 3}, "weights: expected Mapping[str, float] or null, got 3"),
    ({"weights": {"a": "x"}}, "weights: expected Mapping[str, float] or null, got {'a': 'x'}"),
    ({"sizes": [{"rows": 1}, {"kind": "flat"}]}, f"sizes: missing key(s): rows (in {HERE}.Size)"),
    ({"sizes": [{"rows": "x"}]}, f"sizes.rows: expected int, got x (in {HERE}.Size)"),
    ({"tool": {"class_path": TOOL}}, "tool.init_args: missing key(s): name"),
    (
        {"tool": {"class_path": TOOL, "init_args": {"name": "a", "count": "x"}}},
        "tool.init_args.count: expected int, got x",
    ),
    (
        {"tool": {"class_path": TOOL, "init_args": {"name": "a", "mode": "x"}}},
        "tool.init_args.mode: expected on or off, got x",
    ),
    (
        {"tool": {"class_path": TOOL, "init_args": {"name": "a", "size": {"rows": "x"}}}},
        "tool.init_args.size.rows: expected int, got x",
    ),
    (
        {"tool": {"class_path": OTHER, "init_args": {"name": "a", "inner": {"class_path": TOOL}}}},
        f"tool.init_args.inner.init_args: missing key(s): name (in {TOOL})",
    ),
    (
        {"tools": [{"class_path": TOOL, "init_args": {"name": "a", "mode": "x"}}]},
        f"tools.init_args.mode: expected on or off, got x (in {TOOL})",
    ),
    ({"tool": {"class_path": f"{HERE}.Nothing"}}, f"tool: module '{HERE}' has no attribute 'Nothing'"),
    ({"tool": {"class_path": "no_such.Tool"}}, "tool: No module named 'no_such'"),
    ({"tool": SQUARES}, f"tool: import path {SQUARES} does not correspond to a subclass of Tool"),
    ({"tool": 3}, "tool: expected Tool or null, got 3"),
    (
        {"scores": TOOL},
        f"scores: import path {TOOL} does not implement protocol Scores: its methods need the names, arguments and "
        "annotations that Scores has",
    ),
    ({"scores": {"class_path": SQUARES, "init_args": {"power": "x"}}}, "scores.init_args.power: expected int, got x"),
    ({"build": {"class_path": BUILT, "init_args": {"power": "x"}}}, "build.init_args.power: expected int, got x"),
    ({"build": f"{HERE}.Nothing"}, f"build: module '{HERE}' has no attribute 'Nothing'"),
    ({"build": "x"}, "build: expected a class path such as package.module.Class, got x"),
    ({"source": None}, "missing key(s): source"),
    ({"mode": None}, "mode: expected slow or fast, got null"),
    ({"settings": {"size": None}}, "missing key(s): settings.size.rows"),
    (
        {"tool": {"class_path": OTHER, "init_args": {"name": "a", "pace": None}}},
        "tool.init_args.pace: expected Pace, got null",
    ),
    ({"settings": {"size": {"rows": 1, "kind": None}}}, "settings.size.kind: expected flat or tall, got null"),
    (
        {"tool": {"class_path": TOOL, "init_args": {"name": "a", "size": None}}},
        "tool.init_args: missing key(s): size.rows",
    ),
    (
        {"tools": [{"class_path": TOOL, "init_args": {"name": "a", "count": None}}]},
        "tools[0].init_args.count: expected int, got null",
    ),
]


@pytest.mark.parametrize(("content", "expected"), CASES, ids=[expected[:40] for _, expected in CASES])
def test_a_wrong_value_in_a_file(tmp_path: Path, content: dict[str, Any], expected: str) -> None:
    assert refusal(tmp_path, **content) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--mode=warp", "mode: expected slow or fast, got warp"),
        ("--settings=big", "settings: expected a mapping of keys to values, got big"),
        ("--settings.size.rows=x", "settings.size.rows: expected int, got x"),
        ("--tool.init_args.count=x", "tool.init_args.count: expected int, got x"),
        ("--tool.init_args.mode=x", "tool.init_args.mode: expected on or off, got x"),
        ("--tool=3", "tool: expected Tool or null, got 3"),
        ("--build.init_args.power=x", "build.init_args.power: expected int, got x"),
        ("--sizes=[{kind: flat}]", f"sizes: missing key(s): rows (in {HERE}.Size)"),
        ("--sizes=[{", "sizes: expected list[Size] or null, got [{"),
        ("--settings.size=null", "missing key(s): settings.size.rows"),
        ("--tool.init_args.count=null", "tool.init_args.count: expected int, got null"),
        ("--mode=null", "mode: expected slow or fast, got None"),
        ("--sise.rows=3", "unknown key 'sise'. Did you mean 'size'?"),
        ("mode=slow", "unrecognized arguments: mode=slow. Did you mean --mode=slow?"),
        ("stray", "unrecognized arguments: stray"),
        ("--mode", "argument --mode: expected one argument"),
    ],
)
def test_a_wrong_override(tmp_path: Path, word: str, expected: str) -> None:
    tool = {"class_path": TOOL, "init_args": {"name": "a"}}
    assert refusal(tmp_path, word, tool=tool, build=BUILT) == expected


def test_a_name_without_a_value_is_one_line(tmp_path: Path) -> None:
    said = refusal(tmp_path, define={"tools": []}, tools="${tool_list}")
    assert said == ("tools: Interpolation key 'tool_list' not found. A `${...}` names a key or an entry of `define`.")


def test_null_stays_where_the_type_or_the_default_is_null(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"source": "here", "settings": {"rate": None}, "counts": None}))
    parser = RecipeParser(parser_mode="omegaconf+")
    parser.recipe, parser.stage = load_recipe(str(file)), stage
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_function_arguments(stage, skip={"run_dir"})
    parsed = parser.parse_args(parser.recipe.arguments(["--settings.rate=null", "--weights=null"]))
    assert parsed.settings.rate is None and parsed.weights is None and parsed.mode == "slow"


def test_an_override_without_a_value_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("source: here\n")
    with pytest.raises(ValueError, match="--source= has no value"):
        load_recipe(str(file)).arguments(["--source="])
