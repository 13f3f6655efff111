from pathlib import Path

import pytest

from lit_puzzle.run.recipe import Recipe, load_recipe
from lit_puzzle.run.verify import take_verify, verifies_all, verifying


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "base.yaml").write_text("command: evaluate\nverify: fast\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\nverify: full\nseed: 1\n")
    return load_recipe(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    ("words", "level"),
    [
        ([], "full"),
        (["--verify=fast"], "fast"),
        (["--verify", "fast"], "fast"),
        (["--verify=fast", "--verify=full"], "full"),
    ],
)
def test_command_line_counts_more_than_the_recipe(recipe: Recipe, words: list[str], level: str) -> None:
    left, rest, chosen = take_verify(recipe, ["--seed=2", *words, "--overwrite"])
    assert (rest, chosen) == (["--seed=2", "--overwrite"], level)
    assert left.layers == ({"command": "evaluate"}, {"seed": 1})


def test_default_is_fast(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("command: evaluate\n")
    recipe = load_recipe(str(tmp_path / "a.yaml"))
    assert take_verify(recipe, ["--verify_not=1"]) == (recipe, ["--verify_not=1"], "fast")


@pytest.mark.parametrize("words", [["--verify"], ["--verify="], ["--verify=Full"], ["--verify=full", "--verify=no"]])
def test_other_levels_are_refused(recipe: Recipe, words: list[str]) -> None:
    with pytest.raises(ValueError, match="--verify must be full or fast"):
        take_verify(recipe, words)


def test_other_level_of_a_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("command: evaluate\nverify: yes\n")
    with pytest.raises(ValueError, match=r"a\.yaml: verify must be full or fast, got True"):
        take_verify(load_recipe(str(tmp_path / "a.yaml")), [])


def test_level_holds_inside() -> None:
    assert not verifies_all()
    with verifying("full"):
        assert verifies_all()
    assert not verifies_all()
