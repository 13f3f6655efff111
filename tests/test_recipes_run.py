"""Every packaged recipe is parsed into real objects' arguments; unknown keys anywhere in one fail here."""

from pathlib import Path

import pytest
import yaml

from lit_puzzle.cli import main
from lit_puzzle.run.recipe import PACKAGED_RECIPES, load_recipe, packaged_recipes


@pytest.mark.parametrize("relative", packaged_recipes(), ids=str)
def test_recipe_parses_and_says_where_it_writes(relative, capsys):
    recipe = load_recipe(str(PACKAGED_RECIPES / relative))
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(PACKAGED_RECIPES / relative), "--print_config"])
    assert stopped.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["command"] == recipe.value("command")
    assert resolved["run_dir"] == recipe.value("run_dir")


def test_every_recipe_writes_its_own_folder():
    folders = [load_recipe(str(PACKAGED_RECIPES / relative)).value("run_dir") for relative in packaged_recipes()]
    assert len(set(folders)) == len(folders) > 0
    assert all(Path(folder).parts[0] == "runs" for folder in folders)
