"""Names of an earlier version: one line that gives the new one, which exists; today's names are never taken for old."""

import importlib
import inspect
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from lit_puzzle.cli import STAGES, main
from lit_puzzle.run.recipe import PACKAGED_RECIPES, Recipe, load_recipe, packaged_recipes
from lit_puzzle.run.renamed import check_names, new_path, renamed_in_config
from lit_puzzle.run.renamed_names import KEYS, MODULES, SYMBOLS


def recipe_of(content: dict[str, Any]) -> Recipe:
    path = Path("old.yaml")
    return Recipe(path, (content,), (path,))


def has_key(owner: Any, dotted: str) -> bool:
    """Whether a callable, or the dataclass of one of its arguments, takes a dotted key."""
    key, _, rest = dotted.partition(".")
    takes = owner.__init__ if inspect.isclass(owner) else owner
    if key not in inspect.signature(owner).parameters:
        return False
    hint = get_type_hints(takes)[key]
    kinds = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
    if not rest:
        return True
    return any(rest.partition(".")[0] in {f.name for f in fields(kind)} and has_key(kind, rest) for kind in kinds)


def resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return vars(importlib.import_module(module))[name]


@pytest.mark.parametrize("old", MODULES)
def test_an_old_module_is_gone_and_the_new_one_is_there(old: str) -> None:
    assert find_spec(f"lit_puzzle.{MODULES[old]}") is not None
    assert not (Path(inspect.getfile(main)).parent / f"{old.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize("old", SYMBOLS)
def test_a_moved_class_is_there(old: str) -> None:
    assert callable(resolve(f"lit_puzzle.{SYMBOLS[old]}"))


@pytest.mark.parametrize(("owner", "new"), [(owner, new) for owner, keys in KEYS.items() for new in keys.values()])
def test_a_new_key_is_there(owner: str, new: str) -> None:
    assert has_key(resolve(STAGES[owner][0] if owner in STAGES else owner), new)


@pytest.mark.parametrize("name", packaged_recipes(), ids=str)
def test_recipes_of_today_hold_no_old_name(name: Path) -> None:
    check_names(load_recipe(str(PACKAGED_RECIPES / name)), [])


@pytest.mark.parametrize(
    ("content", "words", "told"),
    [
        ({"command": "search", "damage": {"metric": "kl"}}, [], "`damage` is now `objective`"),
        ({"command": "search", "solver": "mip"}, [], "`solver` is now `solver.name`"),
        ({"command": "generate"}, ["--max_new_tokens=8"], "`max_new_tokens` is now `sampling.max_new_tokens`"),
        ({"data": {"class_path": "lit_puzzle.data.PromptData"}}, [], "is now lit_puzzle.data.rl_prompts.PromptData"),
        (
            {"model": {"class_path": "lit_puzzle.rl.module.RLRecovery", "init_args": {"lora": {"rank": 8}}}},
            [],
            "`model.init_args.lora` is now `model.init_args.training.lora`",
        ),
        (
            {"e": [{"class_path": "lit_puzzle.rl.environments.JsonlEnvironment"}]},
            [],
            "is now lit_puzzle.environments.jsonl.JsonlEnvironment",
        ),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(content: dict[str, Any], words: list[str], told: str) -> None:
    with pytest.raises(ValueError, match="earlier version") as refused:
        check_names(recipe_of(content), words)
    assert told in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_a_setting_that_keeps_its_name_is_not_old() -> None:
    check_names(recipe_of({"command": "search", "solver": {"name": "mip"}}), [])
    path = "lit_puzzle.data.calibration.CalibrationData"
    assert new_path(path) == path and new_path("lit_puzzle.training.sharding.Sharded").endswith(
        "training.sharding.Sharded"
    )


def test_the_folder_of_an_old_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"command": "search", "run_dir": str(tmp_path), "damage": {"metric": "kl"}, "num_solutions": 2}
    assert renamed_in_config(yaml.safe_dump(old)) == [
        "`damage` is now `objective`",
        "`num_solutions` is now `solver.num_solutions`",
    ]
    recipe = tmp_path / "old.yaml"
    recipe.write_text(yaml.safe_dump(old))
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(recipe)])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "`damage` is now `objective`" in told and len(told.splitlines()) == 1
