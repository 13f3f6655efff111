"""A pipeline's recipe before parsing: recipes beside it are found, overrides merge by stage and key."""

from pathlib import Path

import pytest

from lit_puzzle.pipeline.prepared import prepared
from lit_puzzle.run.recipe import Recipe, load_recipe


def test_recipes_beside_the_file_come_first_then_packaged_ones(tmp_path: Path) -> None:
    (tmp_path / "library.yaml").write_text("command: library\n")
    file = tmp_path / "pipeline.yaml"
    file.write_text("command: pipeline\nstages:\n- library.yaml\n- {recipe: importance.yaml, name: x}\n")
    recipe, words = prepared(load_recipe(str(file)), ["--run_dir=x"])
    assert recipe.value("stages") == [
        {"recipe": str(tmp_path / "library.yaml")},
        {"recipe": "importance.yaml", "name": "x"},
    ]
    assert words == ["--run_dir=x"]
    packaged, _ = prepared(load_recipe("pipeline.yaml"), [])  # by its name alone, so that it is the packaged one
    assert packaged.value("stages")[0]["recipe"] == "recipes/generate.yaml"


def test_overrides_merge_from_base_to_command_line() -> None:
    below = {"overrides": {"a": {"x": 1, "y": 1}, "b": {"x": 1}}}
    above = {"overrides": {"a": {"y": 2, "z": 2}}}
    recipe = Recipe(Path("p.yaml"), (below, above), (Path("q.yaml"), Path("p.yaml")))
    made, words = prepared(recipe, ["--overrides.a.z.deep=[3, 4]", "--overrides.c={x: null}", "--remake=true"])
    assert words == ["--remake=true"]
    assert [layer.get("overrides") for layer in made.layers] == [
        None,
        {"a": {"x": 1, "y": 2, "z": 2, "z.deep": [3, 4]}, "b": {"x": 1}, "c": {"x": None}},
    ]


@pytest.mark.parametrize("word", ["--overrides.a", "--overrides.a=", "--overrides=3", "--overrides.a=3"])
def test_overrides_of_a_wrong_form_are_refused(word: str) -> None:
    recipe = Recipe(Path("p.yaml"), ({},), (Path("p.yaml"),))
    with pytest.raises(ValueError, match="overrides"):
        prepared(recipe, [word])
