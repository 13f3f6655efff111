"""The recipes follow one another: every folder that one reads is the output of an earlier one, of the same parent."""

from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from lit_puzzle.run.recipe import PACKAGED_RECIPES, load_recipe, packaged_recipes

BY_SCRIPTS = ("runs/smollm2/blocks.json",)  # scripts/measure_blocks.py, as the recipe says
FROM_THE_USER = ("models/", "prompts/", "lit_puzzle/")
OWN_KEYS = ("run_dir", "save_dir", "dirpath", "default_root_dir")
OUTPUTS = {  # what may be named inside a run folder, by command or class of the model; else the folder is named
    "generate": {"documents"},
    "assemble": {"child"},
    "average": {"child"},
    "export": {"model"},
    "precompute_logits": {"top_logits"},
    "search": {"plan.json"},
    "GlobalDistillation": {"child"},
    "OnPolicyDistillation": {"child"},
    "RLRecovery": {"child"},
    "BlockwiseDistillation": {"library"},
}


def merged(layers: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Merge the layers of a recipe as jsonargparse does, as far as these recipes need it."""

    def join(below: Any, above: Any) -> Any:
        if not isinstance(below, dict) or not isinstance(above, dict):
            return above
        if above.get("class_path", below.get("class_path")) != below.get("class_path"):
            return above
        return below | {key: join(below.get(key), value) for key, value in above.items()}

    result: dict[str, Any] = {}
    for layer in layers:
        result = join(result, layer)
    return result


RECIPES = {path: merged(load_recipe(str(PACKAGED_RECIPES / path)).layers) for path in packaged_recipes()}
MADE_BY = {recipe["run_dir"]: path for path, recipe in RECIPES.items()}


def family(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else "tiny"


def kind(path: Path) -> str:
    """The command of a recipe, or the class of its model."""
    model = RECIPES[path].get("model")
    return str(model["class_path"]).rpartition(".")[2] if isinstance(model, dict) else str(RECIPES[path]["command"])


def texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from texts(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from texts(value, key)
    elif isinstance(node, str):
        yield key, node


def inputs(path: Path) -> list[str]:
    """The run folders, and folders inside them, that a recipe reads."""
    found = {text for key, text in texts(RECIPES[path]) if key not in OWN_KEYS and text.startswith("runs/")}
    return sorted(found.difference(BY_SCRIPTS))


def maker(folder: str) -> tuple[Path, str] | None:
    """The recipe that makes a folder, and what of its run folder is named."""
    parts = Path(folder).parts
    for length in range(len(parts), 0, -1):
        found = MADE_BY.get("/".join(parts[:length]))
        if found is not None:
            return found, "/".join(parts[length:])
    return None


@pytest.mark.parametrize("path", list(RECIPES), ids=str)
def test_every_input_is_made_by_another_recipe_of_the_same_parent(path: Path) -> None:
    own = [f"runs/{entry.get('name')}" for entry in RECIPES[path].get("stages", []) if isinstance(entry, dict)]
    for folder in inputs(path):
        if "/".join(Path(folder).parts[:2]) in own:  # of a stage by its name, which has placeholders in a grid
            continue
        made = maker(folder)
        assert made is not None, f"no recipe makes {folder}"
        other, inside = made
        assert other != path and family(other) == family(path), f"{folder} is made by {other}"
        assert not inside or inside in OUTPUTS.get(kind(other), set()), f"{kind(other)} makes no {inside}"


def test_no_recipe_waits_for_itself() -> None:
    graph = {path: {made[0] for folder in inputs(path) if (made := maker(folder))} for path in RECIPES}
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) == len(RECIPES)


@pytest.mark.parametrize("name", ["gpt_oss_20b", "gpt_oss_120b"])
def test_one_parent_and_one_date_in_a_family(name: str) -> None:
    values = [pair for path, recipe in RECIPES.items() if family(path) == name for pair in texts(recipe)]
    assert {text for _, text in values if text.startswith("models/")} == {f"models/{name.replace('_', '-')}"}
    others = [text for _, text in values if "/" in text and text.split("/")[0] in ("runs", "models", "prompts")]
    assert all(text.startswith(FROM_THE_USER) or maker(text) for text in others)
    dates = {recipe["chat_date"] for path, recipe in RECIPES.items() if family(path) == name and "chat_date" in recipe}
    assert len(dates) == 1


def ancestors(path: Path) -> set[Path]:
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        direct = {made[0] for folder in inputs(waiting.pop()) if (made := maker(folder))}
        waiting += direct - found
        found |= direct
    return found


@pytest.mark.parametrize(
    "export", [path for path in RECIPES if path.name == "export.yaml" and family(path).startswith("gpt_oss")], ids=str
)
def test_what_is_exported_was_searched_distilled_and_recovered(export: Path) -> None:
    assert {"generate", "final_kl", "library", "score", "search", "assemble", "KVCalibration"} <= {
        kind(path) for path in ancestors(export)
    }
    checkpoint = maker(RECIPES[export]["checkpoint"])
    assert checkpoint is not None
    recipe = RECIPES[checkpoint[0]]
    averages = kind(checkpoint[0]) == "average"
    recovered = [maker(recipe[name]) for name in ("first", "second")] if averages else [checkpoint]
    assert len(set(recovered)) == len(recovered)
    for run in recovered:
        assert run is not None and kind(run[0]) == "RLRecovery"
        child = maker(RECIPES[run[0]]["model"]["init_args"]["child"])
        assert child is not None and kind(child[0]) == "GlobalDistillation"
    kv = maker(RECIPES[export]["kv_scales"])
    assert kv is not None and RECIPES[kv[0]]["model"]["init_args"]["checkpoint"] == RECIPES[export]["checkpoint"]


@pytest.mark.parametrize("name", ["gpt_oss_20b", "gpt_oss_120b"])
def test_real_parents_are_ranked_sampled_and_served_as_documented(name: str) -> None:
    own = {path: recipe for path, recipe in RECIPES.items() if family(path) == name}
    (search,) = [recipe for path, recipe in own.items() if kind(path) == "search" and "one_gpu" not in str(path)]
    assert search["objective"] == {"metric": "mean_rank", "window_metric": "long_context", "balance": 0.5}
    for path, recipe in own.items():
        if kind(path) == "evaluate":
            assert recipe["sampling"]["temperature"] == 1.0 and recipe["held_out"]["samples_per_prompt"] > 1
        if kind(path) in ("evaluate", "generate"):
            assert recipe["engine"]["name"] == "vllm" and recipe["engine"]["data_parallel"] == "auto"
        if kind(path) in ("ExpertImportance", "final_kl", "score"):
            assert recipe["data"]["init_args"]["documents"]["folder"] == f"runs/{name}/generate"
    tiny = [recipe for path, recipe in RECIPES.items() if family(path) == "tiny" and kind(path) == "evaluate"]
    assert all(recipe["sampling"]["temperature"] == 0.0 for recipe in tiny)
