"""The values that `--plan` reads without importing a stage are those that the parser gives the stage."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ActionConfigFile

from lit_puzzle.cli import LIGHTNING_COMMANDS, STAGES, _stage_function
from lit_puzzle.run.parser import RecipeParser
from lit_puzzle.run.recipe import Recipe, load_recipe, packaged_recipes
from lit_puzzle.run.recipe_values import recipe_values
from lit_puzzle.run.source_defaults import PACKAGE, parameters_of

OVERRIDES = {
    "rl_recover.yaml": ["--model.init_args.training.lora=null", "--model.grpo.sampling.max_new_tokens=7"],
    "gpt_oss_20b/distill.yaml": ["--trainer.max_steps=3", "--model.init_args.training={dtype: float32}"],
    "calibrate_kv.yaml": [
        "--data=lit_puzzle.data.documents.PackedDocuments",
        "--data.init_args.documents=runs/d",
        "--data.init_args.parent=lit_puzzle/assets/tiny_parent",
        "--data.init_args.sequence_tokens=512",
    ],
    "generate.yaml": ["--prompts.file=f.jsonl", "--prompts.environments=null", "--prompts.efforts={high: 1.0}"],
}


def parsed(recipe: Recipe, words: list[str]) -> dict[str, Any]:
    """The recipe as the parser of its command resolves it, as plain YAML."""
    command = recipe.value("command")
    if command in LIGHTNING_COMMANDS:
        from lit_puzzle.training.lightning import LightningRecipeParser, RecipeCLI

        class OnlyParsed(RecipeCLI):
            def instantiate_classes(self) -> None:
                pass

        cli = OnlyParsed(recipe, words)
        assert isinstance(cli.parser, LightningRecipeParser)
        return yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False))
    function = _stage_function(command, recipe.path)
    parser = RecipeParser(parser_mode="omegaconf+")
    parser.recipe, parser.stage = recipe, function
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_argument("--command", type=str)
    parser.add_argument("--run_dir", type=str, required=True)
    parser.add_date()
    parser.add_function_arguments(function, skip={"run_dir"})
    return yaml.safe_load(parser.dump(parser.parse_args(recipe.arguments(words)), skip_unset=False))


def differences(planned: Any, real: Any, place: str) -> Iterator[str]:
    """Leaves of the planned values that are not the parser's."""
    if isinstance(planned, dict) and isinstance(real, dict):
        for key, value in planned.items():
            shown = {str(name): item for name, item in real.items()}  # jsonargparse dumps whole numbers as text
            if str(key) in shown:
                yield from differences(value, shown[str(key)], f"{place}.{key}")
            elif value == {}:  # an object without arguments
                continue
            elif place.startswith((".model", ".data")) or value is not None:
                yield f"{place}.{key} = {value!r} is unknown to the parser"
    elif isinstance(planned, list) and isinstance(real, list) and len(planned) == len(real):
        for index, (value, other) in enumerate(zip(planned, real, strict=True)):
            yield from differences(value, other, f"{place}[{index}]")
    elif isinstance(real, dict) and isinstance(planned, str) and real.get("class_path") == planned:
        return
    elif planned != real:
        yield f"{place} = {planned!r}, not {real!r}"


@pytest.mark.parametrize("relative", packaged_recipes(), ids=str)
def test_values_are_those_of_the_parser(relative: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(str(Path("recipes") / relative))
    command = recipe.value("command")
    for words in ([], OVERRIDES.get(str(relative), [])):
        target = None if command in LIGHTNING_COMMANDS else STAGES[command][0] if command in STAGES else command
        values = recipe_values(recipe, words, target).content
        real = parsed(recipe, words)
        parts = ("model", "data") if target is None else tuple(key for key in values if key not in ("base",))
        assert list(differences({key: values[key] for key in parts if key in values}, real, "")) == []
        if target is None:
            given = {
                key: values["trainer"][key] for key in ("devices", "max_steps", "precision") if key in values["trainer"]
            }
            assert given == {key: real["trainer"][key] for key in given}
            missing = {key for part in parts for key in real[part]["init_args"] if key not in values[part]["init_args"]}
        else:
            missing = {key for key in real if key not in values and key not in ("config", "verify", "chat_date")}
        assert missing == set(), "keys that the plan does not know"


def test_a_wrong_key_is_named_with_the_nearest() -> None:
    recipe = load_recipe("recipes/rl_recover.yaml")
    with pytest.raises(ValueError, match=r"unknown key 'model.init_args.grpo.num_generation'. Did you mean 'num_gen"):
        recipe_values(recipe, ["--model.init_args.grpo.num_generation=2"], None)


def test_a_reference_to_nothing_is_refused() -> None:
    recipe = load_recipe("recipes/rl_recover.yaml")
    with pytest.raises(ValueError, match="names no value"):
        recipe_values(recipe, ["--model.init_args.child=${nowhere.at.all}"], None)


def test_defaults_are_read_without_importing() -> None:
    code = (
        "import sys; from lit_puzzle.run.source_defaults import parameters_of as p;"
        "p('lit_puzzle.rl.module.RLRecovery'); print('torch' in sys.modules, 'lit_puzzle.rl.module' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert parameters_of("torch.optim.AdamW") is None and PACKAGE == "lit_puzzle"
