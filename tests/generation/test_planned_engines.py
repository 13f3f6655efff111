"""Every stage that takes settings of an engine plans the engine: its memory, beside what else is on the device."""

import re
from pathlib import Path

import pytest

from lit_puzzle.cli import STAGES
from lit_puzzle.footprint.at_hand import asked_device
from lit_puzzle.footprint.plan import Plan, make_plan
from lit_puzzle.generation.footprint import VLLM_SHARE, apart_bytes
from lit_puzzle.model.footprint import kv_bytes, model_size, stored_bytes
from lit_puzzle.model.planned_shape import PUBLISHED
from lit_puzzle.model.streaming_need import IMPORTED
from lit_puzzle.run.footprint import GIB
from lit_puzzle.run.recipe import load_recipe
from lit_puzzle.run.recipe_values import Values

ROOT = Path(__file__).parents[2]
SIZE = model_size(PUBLISHED["20b"])
PROMPTS = "--data.init_args.prompts={environments: [], num_prompts: 100}"
PLACES: dict[
    str, list[tuple[str, str, list[str]]]
] = {  # file that takes settings of an engine -> recipes, the key there, and what makes the stage use it
    "data/generate.py": [("gpt_oss_20b/generate", "engine", [])],
    "data/calibration.py": [
        ("gpt_oss_20b/importance", "data.init_args.engine", ["--data.init_args.documents=null", PROMPTS]),
        ("importance", "data.init_args.engine", []),
        ("score", "data.init_args.engine", []),
    ],
    "evaluate/accuracy.py": [("gpt_oss_20b/evaluate", "engine", [])],
    "evaluate/long_context.py": [("score", "evaluations.0.init_args.engine", [])],
    "evaluate/before_after.py": [("gpt_oss_20b/rl_recover", "model.init_args.evaluation.engine", [])],
    "distill/settings.py": [("gpt_oss_20b/distill", "model.init_args.evaluation.engine", [])],
    "child/settings.py": [("gpt_oss_20b/average", "sweep.engine", [])],
}


def planned(recipe_name: str, *words: str) -> Plan:
    recipe = load_recipe(f"recipes/{recipe_name}.yaml")
    command = recipe.value("command")
    target = STAGES[command][0] if command in STAGES else None
    made = make_plan(recipe, command, target, ["--gpus=8", "--gpu=H100", *words])
    assert made is not None
    return made


def vllm_phases(plan: Plan) -> list[str]:
    """Return the phases in which vLLM holds most of a GPU."""
    most = 0.8 * plan.device.memory_bytes
    phases = [phase for phase in plan.footprint.phases if any("KV cache and work" in part for part in phase.parts)]
    return [phase.name for phase in phases if phase.peak_bytes > most]


def test_the_places_are_all_there_are() -> None:
    found = set()
    for path in (ROOT / "lit_puzzle").rglob("*.py"):
        if re.search(r"^\s+(engine): EngineSettings( \| None)? = ", path.read_text(), re.MULTILINE):
            found.add(path.relative_to(ROOT / "lit_puzzle").as_posix())
    assert found == set(PLACES)


@pytest.mark.parametrize(
    ("recipe", "key", "words"), [row for rows in PLACES.values() for row in rows], ids=lambda value: str(value)[:40]
)
def test_vllm_is_planned_where_a_recipe_asks_for_it(recipe: str, key: str, words: list[str]) -> None:
    if key.startswith("evaluations.0"):
        given = load_recipe(f"recipes/{recipe}.yaml").value("evaluations")[0]
        given["init_args"]["engine"] = {"name": "vllm"}
        with_vllm = planned(recipe, *words, f"--evaluations={[given]}")
        given["init_args"]["engine"] = {"name": "transformers"}
        without = planned(recipe, *words, f"--evaluations={[given]}")
    else:
        with_vllm, without = (planned(recipe, *words, f"--{key}={{name: {name}}}") for name in ("vllm", "transformers"))
    assert vllm_phases(with_vllm) and not vllm_phases(without)


def test_beside_training_vllm_gets_its_share_of_what_is_free() -> None:
    device, held = asked_device("H100", 8), 20.0 * GIB
    engine = Values({"name": "vllm", "dtype": "bfloat16", "batch_size": 128, "data_parallel": "auto"})
    parts = apart_bytes(SIZE, engine, device, held, 512, 1024, 1000)
    assert parts["weights of engines apart"] == stored_bytes(SIZE)
    assert sum(parts.values()) == pytest.approx(VLLM_SHARE * (device.usable_bytes - held))
    tight = apart_bytes(SIZE, engine, device, device.usable_bytes - 2 * GIB, 512, 1024, 1000)
    assert sum(tight.values()) == stored_bytes(SIZE) + kv_bytes(SIZE, 1, 1536, 2)  # more than there is: does not fit


def test_engines_beside_training_on_a_cpu_share_its_memory() -> None:
    device = asked_device("cpu", 2)
    settings = {"name": "transformers", "dtype": "float32", "batch_size": 4, "data_parallel": 1}
    one, three = (
        sum(apart_bytes(SIZE, Values(settings | {"data_parallel": count}), device, 0.0, 75, 32, 12).values())
        for count in (1, 3)
    )
    assert three == 3 * one > 3 * (4 * SIZE.parameters + IMPORTED) / 2
