"""Recipes: finding, expanding `base:`, and messages about what is wrong in them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from jsonargparse import ActionConfigFile

from lit_puzzle.run.parser import RecipeParser, explain
from lit_puzzle.run.recipe import (
    PACKAGED_RECIPES,
    Recipe,
    find_recipe,
    load_recipe,
    packaged_recipes,
    recipe_that_makes,
)


def write(path: Path, **content: object) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_base_comes_first_and_relative_to_the_file(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "a.yaml", command="fit", run_dir="runs/a")
    write(tmp_path / "b.yaml", base="a.yaml", run_dir="runs/b")
    recipe = load_recipe(str(write(tmp_path / "deep" / "c.yaml", base=["../a.yaml", "../b.yaml"], seed_everything=1)))
    assert [file.name for file in recipe.files] == ["a.yaml", "a.yaml", "b.yaml", "c.yaml"]
    assert recipe.value("run_dir") == "runs/b"
    assert recipe.value("command") == "fit"
    assert recipe.value("model") is None
    assert all("base" not in layer for layer in recipe.layers)


def test_base_loop_names_its_files(tmp_path):
    write(tmp_path / "a.yaml", base="b.yaml")
    write(tmp_path / "b.yaml", base="a.yaml")
    with pytest.raises(ValueError, match=r"loop: a\.yaml -> b\.yaml -> a\.yaml"):
        load_recipe(str(tmp_path / "a.yaml"))


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"no recipe 'nowhere\.yaml', on disk or .* `lightning recipes` lists the packaged ones\.$"
    ):
        find_recipe("nowhere.yaml")
    for typed in ("recipes/rl_recovery.yaml", "rl_recover.yml", "rl_recover"):
        with pytest.raises(ValueError, match=r"in the package\. Did you mean recipes/rl_recover\.yaml\? `lightning"):
            find_recipe(typed)
    with pytest.raises(ValueError, match=r"base: gone\.yaml"):
        load_recipe(str(write(tmp_path / "a.yaml", base="gone.yaml")))
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match="must be a YAML mapping"):
        load_recipe(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(str(tmp_path / "broken.yaml"))


def test_defined_values_stand_wherever_they_are_named(tmp_path):
    write(tmp_path / "a.yaml", define={"tiny": [{"name": "first"}], "few": 3}, nested={"items": "${tiny}"})
    own = {
        "define": {"few": 4},
        "nested": {"count": "${few}", "items": [{"of": "${tiny}"}], "kept": "${run_dir}/${few}"},
    }
    recipe = load_recipe(str(write(tmp_path / "b.yaml", base="a.yaml", **own)))
    assert recipe.layers[0] == {"nested": {"items": [{"name": "first"}]}}
    assert recipe.layers[1]["nested"] == {
        "count": 4,
        "items": [{"of": [{"name": "first"}]}],
        "kept": "${run_dir}/${few}",
    }
    with pytest.raises(ValueError, match=r"c\.yaml: `define` must be a mapping of names to values, got \[1\]"):
        load_recipe(str(write(tmp_path / "c.yaml", define=[1])))


def test_bases_without_a_command_are_no_recipes():
    bases = {"trainer.yaml", "tiny_environments.yaml"}
    assert all((PACKAGED_RECIPES / name).is_file() for name in bases)
    assert not bases & {str(path) for path in packaged_recipes()}


def test_packaged_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for relative in packaged_recipes():
        assert find_recipe(str(Path("recipes") / relative)).is_file()
        assert find_recipe(str(relative)).is_file()


def test_the_maker_of_a_folder_is_known():
    assert recipe_that_makes(Path("runs/importance/importance.json")) == "recipes/importance.yaml"
    assert recipe_that_makes(Path("somewhere/else")) is None


@dataclass(frozen=True)
class Item:
    """An element of a list in a recipe."""

    name: str
    size: int = 1
    limit: int | None = None


def parsed(recipe: Recipe, *words: str) -> list[Item]:
    parser = RecipeParser(parser_mode="omegaconf+")
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--nested.items", type=list[Item])
    return parser.instantiate(parser.parse_args(recipe.arguments(words))).nested["items"]


def test_a_list_replaces_the_list_of_its_base(tmp_path):
    items = [{"name": "first", "size": 7, "limit": 3}]
    base = write(tmp_path / "base.yaml", nested={"items": items})
    assert parsed(load_recipe(str(base))) == [Item("first", 7, 3)]
    recipe = load_recipe(str(write(tmp_path / "a.yaml", base="base.yaml", nested={"items": [{"name": "second"}]})))
    assert parsed(recipe) == [Item("second")]
    assert parsed(recipe, "--nested.items=[{name: third}]") == [Item("third")]
    assert parsed(load_recipe(str(base)), "--nested.items=[{name: third}]") == [Item("third")]
    silent = load_recipe(str(write(tmp_path / "b.yaml", base="base.yaml", nested={})))
    assert parsed(silent) == [Item("first", 7, 3)]


@dataclass
class Adapters:
    """Settings that an object may go without."""

    rank: int = 8


@dataclass
class Training:
    """Settings with such settings inside."""

    adapters: Adapters | None = None


class Trained:
    """An object with both."""

    def __init__(self, training: Training = Training()) -> None:  # noqa: B008
        self.training = training


def test_null_in_an_override_takes_settings_away(tmp_path):
    model = {"class_path": f"{__name__}.Trained", "init_args": {"training": {"adapters": {"rank": 4}}}}
    recipe = load_recipe(str(write(tmp_path / "a.yaml", model=model)))
    parser = RecipeParser(parser_mode="omegaconf+")
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--model", type=Trained)
    for words, expected in (([], Adapters(4)), (["--model.init_args.training.adapters=null"], None)):
        assert parser.instantiate(parser.parse_args(recipe.arguments(words))).model.training.adapters == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Option 'trainr.max_steps' is not accepted", "unknown key 'trainr' in {file}. Did you mean 'trainer'?"),
        ("Group 'trainer' does not accept option 'max_stepz'", "unknown key 'max_stepz'. Did you mean 'max_steps'?"),
        ("unrecognized arguments: --trainer.max_stepz=3", "unknown key 'max_stepz'. Did you mean 'max_steps'?"),
        ("Option 'dirpat' is not accepted\n  long story", "unknown key 'dirpat'. Did you mean 'dirpath'?"),
    ],
)
def test_unknown_keys_come_with_the_nearest_valid_one(tmp_path, message, expected):
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    file = write(tmp_path / "a.yaml", trainr={"max_steps": 1}, trainer={"callbacks": [callback]})
    said = explain(message, load_recipe(str(file)), ["trainer", "trainer.max_steps", "model"])
    assert said == expected.format(file=file)
