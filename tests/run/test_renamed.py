"""Names of earlier versions: each is refused in one line with the new name, and the table names only what exists."""

import importlib
import inspect
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from lit_puzzle.cli import STAGES
from lit_puzzle.run.open_run import open_run
from lit_puzzle.run.recipe import load_recipe, packaged_recipes
from lit_puzzle.run.renamed import check_names, new_path, renamed_in_config
from lit_puzzle.run.renamed_names import KEYS, MODULES, SYMBOLS

SEARCH = {"command": "search", "run_dir": "run"}


def refusal(tmp_path: Path, content: dict[str, Any], *words: str) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        check_names(load_recipe(str(file)), words)
    return str(caught.value)


def test_old_names_of_a_file_are_all_in_one_line(tmp_path: Path) -> None:
    times = {"class_path": "lit_puzzle.search.costs.roofline.Roofline"}
    message = refusal(tmp_path, SEARCH | {"damage": {"metric": "kl"}, "times": times, "solver": "mip"})
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}: names of an earlier version: ")
    assert "lit_puzzle.search.costs.roofline.Roofline is now lit_puzzle.costs.roofline.Roofline;" in message
    assert "`damage` is now `objective`;" in message
    assert "`solver` is now `solver.name`;" in message
    assert message.endswith("`times` is now `costs.times`.")


def test_old_names_of_a_base_are_told_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(SEARCH | {"limits": None}))
    message = refusal(tmp_path, {"base": "base.yaml"})
    assert message == f"{tmp_path / 'base.yaml'}: names of an earlier version: `limits` is now `constraints.limits`."


def test_old_names_inside_objects_and_lists(tmp_path: Path) -> None:
    environment = {"class_path": "lit_puzzle.rl.environments.JsonlEnvironment"}
    data = {"class_path": "lit_puzzle.search.calibration.CalibrationData", "init_args": {"environments": [environment]}}
    message = refusal(tmp_path, {"command": "validate", "run_dir": "run", "data": data})
    assert (
        "lit_puzzle.rl.environments.JsonlEnvironment is now lit_puzzle.environments.jsonl.JsonlEnvironment" in message
    )
    assert "`data.init_args.environments` is now `data.init_args.prompts.environments`" in message


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--solver=greedy", "`solver` is now `solver.name`"),
        ("--damage.metric=kl", "`damage` is now `objective`"),
        ("--seed=3", "`seed` is now `solver.seed`"),
        ("--costs.times=lit_puzzle.search.costs.roofline.Roofline", "is now lit_puzzle.costs.roofline.Roofline"),
        ("--costs.times={class_path: lit_puzzle.search.costs.roofline.Roofline}", "is now lit_puzzle.costs.roofline"),
        ("--limits=null", "`limits` is now `constraints.limits`"),
    ],
)
def test_an_old_name_in_an_override(tmp_path: Path, word: str, expected: str) -> None:
    message = refusal(tmp_path, SEARCH, word)
    assert message.startswith(word.partition("=")[0]) and expected in message


def test_an_old_key_of_an_object_in_an_override(tmp_path: Path) -> None:
    model = {"class_path": "lit_puzzle.rl.module.RLRecovery", "init_args": {"child": "x"}}
    message = refusal(tmp_path, {"command": "fit", "model": model}, "--model.init_args.grpo.epsilon=0.1")
    assert "`model.init_args.grpo.epsilon` is now `model.init_args.grpo.loss.epsilon`" in message


def test_new_names_pass(tmp_path: Path) -> None:
    for relative in packaged_recipes():
        check_names(load_recipe(str(relative)), [])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(SEARCH | {"solver": {"name": "mip", "seed": 1}}))
    check_names(load_recipe(str(recipe)), ["--solver.name=greedy", "--costs.times=lit_puzzle.costs.roofline.Roofline"])
    assert new_path("lit_puzzle.data.rl_prompts.PromptData") == "lit_puzzle.data.rl_prompts.PromptData"
    assert new_path("lit_puzzle.data.PromptData") == "lit_puzzle.data.rl_prompts.PromptData"


def test_a_run_folder_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SEARCH | {"damage": None, "seed": 0}))
    with pytest.raises(ValueError, match=r"^[^\n]+ earlier version, in which 2 names differ[^\n]+`objective`[^\n]+$"):
        open_run(tmp_path, yaml.safe_dump(SEARCH), overwrite=False)
    assert renamed_in_config(yaml.safe_dump(SEARCH)) == []


# ---- the table ----------------------------------------------------------------------------------------------------


def test_modules_and_classes_of_the_table() -> None:
    for old, new in MODULES.items():
        assert find_spec(f"lit_puzzle.{new}"), new
        parent = old.rpartition(".")[0]
        assert not find_spec(f"lit_puzzle.{parent}") or not find_spec(f"lit_puzzle.{old}"), f"{old} still exists"
    for new in SYMBOLS.values():
        module, _, name = new.rpartition(".")
        assert name in vars(importlib.import_module(f"lit_puzzle.{module}")), new


def arguments(owner: str) -> set[str]:
    """The dotted keys that a stage or class has in a recipe, dataclasses included."""
    module, _, name = STAGES.get(owner, (owner,))[0].rpartition(".")
    found = vars(importlib.import_module(module))[name]
    hints = typing.get_type_hints(found.__init__ if inspect.isclass(found) else found)
    return {key for name, kind in hints.items() for key in (name, *_inside(kind, f"{name}."))}


def _inside(annotation: Any, prefix: str) -> Iterator[str]:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and is_dataclass(kind):
            for each in fields(kind):
                yield f"{prefix}{each.name}"
                yield from _inside(typing.get_type_hints(kind)[each.name], f"{prefix}{each.name}.")


@pytest.mark.parametrize("owner", KEYS)
def test_new_keys_exist_and_old_ones_do_not(owner: str) -> None:
    known = arguments(owner)
    for old, new in KEYS[owner].items():
        assert new in known, f"{owner} has no {new}"
        assert old not in known or new.startswith(f"{old}."), f"{owner} still has {old}"
