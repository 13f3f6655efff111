"""The `config.json` of a model that a recipe names, whether its folder exists yet or not.

A folder that is there is read (config.json only). Else the recipe that makes it is followed to its own parent, as far
as a folder that exists or a published model, whose shape is known. What was assumed is returned with it. Writes
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lit_puzzle.model.family import family_of
from lit_puzzle.model.layout import layer_blocks
from lit_puzzle.run.files import read_json
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.run.recipe import load_recipe, recipe_that_makes

_GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201_088,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}
PUBLISHED: Mapping[str, Mapping[str, Any]] = {  # the config.json of openai/gpt-oss-20b and -120b, as far as sizes go
    "120b": _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    "20b": _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},  # second: "120b" ends like this
}
OWN: Mapping[str, Mapping[str, Any]] = {  # of a folder that a script of this project makes
    "smollm2-135m": {  # scripts/smollm2_parent.py
        "model_type": "gpt_oss",
        "hidden_size": 576,
        "intermediate_size": 192,
        "num_hidden_layers": 30,
        "num_local_experts": 8,
        "num_experts_per_tok": 8,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49_152,
        "sliding_window": 8192,
        "layer_types": ["full_attention"] * 30,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
}


class Planned(NamedTuple):
    """A configuration, and what was assumed about it (empty if it was read)."""

    config: Mapping[str, Any]
    assumed: str


def planned_config(folder: Path, above: tuple[Path, ...] = ()) -> Planned:
    """Return the configuration of a model's folder, or the best guess.

    Args:
        folder: checkpoint folder that a recipe names; relative ones also in the package.
        above: folders whose recipes led here.

    Raises:
        ValueError: nothing is known about it: the folder is not there, and no packaged recipe makes it.
    """
    for place in (folder, PACKAGE.parent / folder):
        if (place / "config.json").is_file():
            return Planned(read_json(place / "config.json"), "")
    name = recipe_that_makes(folder)
    if name is not None and folder not in above:
        recipe = load_recipe(name)
        source = _source(recipe.layers)
        if source is not None:
            config, _ = planned_config(Path(source), (*above, folder))
            return Planned(*_child(config, recipe.layers, folder, source))
    for key, config in PUBLISHED.items():
        if key in folder.name.lower():
            return Planned(config, f"{folder} is not there: the shape of gpt-oss-{key} is assumed")
    for key, config in OWN.items():
        if key in folder.name.lower():
            return Planned(config, f"{folder} is not there: the shape of {key} is assumed")
    raise ValueError(
        f"{folder} is not there, and neither a packaged recipe nor a published shape ({', '.join(PUBLISHED)} in the "
        "folder's name) says what it will be. A config.json in that folder is enough for a plan."
    )


def _source(layers: tuple[dict[str, Any], ...]) -> str | None:
    """Return the folder of the model that a recipe starts from: a child before a parent."""
    for key in ("child", "checkpoint", "first", "parent"):
        for layer in reversed(layers):
            for place in (layer, (layer.get("model") or {}).get("init_args") or {}):
                value = place.get(key) if isinstance(place, Mapping) else None
                if isinstance(value, str) and not value.startswith("${"):
                    return value
    return None


def _child(
    config: Mapping[str, Any], layers: tuple[dict[str, Any], ...], folder: Path, source: str
) -> tuple[Mapping[str, Any], str]:
    """Return the configuration of what a recipe makes: by its plan of numbers if it has one, else like its source."""
    manual = next((layer["manual"] for layer in reversed(layers) if "manual" in layer), None)
    if not isinstance(manual, Mapping):
        return config, f"{folder} is not there: at most the size of {source} is assumed"
    return planned_child(config, manual)[0], f"{folder} is not there: the plan of its recipe is assumed"


def planned_child(config: Mapping[str, Any], manual: Mapping[str, Any]) -> Planned:
    """Return the configuration of a child whose plan is numbers.

    Args:
        config: the parent's.
        manual: `experts` (of every layer, or a list) and `windows`, as `lit_puzzle.child.settings.ManualPlan` has them.
    """
    blocks = layer_blocks(config)
    experts, windows = manual.get("experts"), manual.get("windows") or {}
    counts = experts if isinstance(experts, list) else [experts or count for count, _ in blocks]
    made = [
        {"num_local_experts": count, "sliding_window": windows.get(layer, window)}
        for layer, (count, (_, window)) in enumerate(zip(counts, blocks, strict=True))
    ]
    child = {key: value for key, value in config.items() if key not in ("layer_types", "num_local_experts")}
    return Planned(child | {"model_type": family_of(config).child.model_type, "block_configs": made}, "")
