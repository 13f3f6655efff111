"""What `--plan` says of on-policy distillation, and of one part that trains alone."""

import pytest

from lit_puzzle.footprint.plan import Plan, make_plan
from lit_puzzle.run.recipe import load_recipe

TINY, LARGE = "recipes/on_policy.yaml", "recipes/gpt_oss_120b/on_policy.yaml"


def planned(name: str, *words: str) -> Plan:
    recipe = load_recipe(name)
    plan = make_plan(recipe, recipe.value("command"), None, ["--plan", *words])
    assert plan is not None
    return plan


def parts(plan: Plan, phase: str) -> dict[str, float]:
    return dict(next(each for each in plan.footprint.phases if each.name == phase).parts)


def test_twice_the_rows_are_twice_the_activations_and_cache() -> None:
    rows = "--model.init_args.on_policy.completions_per_device="
    one, two = (planned(TINY, "--gpus=1", "--gpu=cpu", f"{rows}{count}") for count in (64, 128))
    for phase, name in (("update", "activations"), ("rollouts", "prompts while they are read")):
        assert parts(two, phase)[name] == pytest.approx(2 * parts(one, phase)[name])
    assert parts(one, "update")["parent"] == parts(two, "rollouts")["parent"] > 0


def test_the_routers_of_the_largest_parent_are_thirteen_million_numbers() -> None:
    """Its child is not there, so that it is taken to be as large as the parent: 36 x (128 x 2880 + 128)."""
    part = "--model.init_args.training.trainable="
    trained = {
        name: 32 * parts(planned(LARGE, "--gpus=32", "--gpu=H100", f"{part}{name}"), "update")["gradients"] / 4
        for name in ("router", "attention", "attention_and_router")
    }
    assert trained["router"] == 13_275_648
    assert trained["attention_and_router"] == trained["router"] + trained["attention"]


def test_top_k_leaves_out_the_parents_head_and_vllm_brings_its_memory() -> None:
    words = ["--gpus=32", "--gpu=H100"]
    plain = parts(planned(LARGE, *words), "update")
    top = parts(planned(LARGE, *words, "--model.init_args.on_policy.top_k=64"), "update")
    assert set(plain) - set(top) == {"gathered embedding and head of the parent"}
    engine = planned(LARGE, *words, "--model.init_args.on_policy.rollouts.engine=vllm")
    assert parts(engine, "rollouts")["weights of vLLM"] > 0 and engine.footprint.host
