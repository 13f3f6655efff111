"""What `final_kl` and `combine_importance` cost by their plans: passes, memory and disk against counts by hand."""

from pathlib import Path

import pytest

from lit_puzzle.cli import STAGES
from lit_puzzle.footprint.plan import Plan, make_plan
from lit_puzzle.model.footprint import model_size
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.footprint import GIB
from lit_puzzle.run.recipe import load_recipe
from lit_puzzle.scoring.footprint import routed_share

PARENT = Path("lit_puzzle/assets/tiny_parent")
LARGE = ("--parent=models/gpt-oss-120b", "--data.init_args.sequences=missing.jsonl", "--fabric.precision=bf16-true")


def planned(name: str, *words: str) -> Plan:
    recipe = load_recipe(name)
    command = recipe.value("command")
    plan = make_plan(recipe, command, STAGES[command][0], ["--plan", *words])
    assert plan is not None
    return plan


def test_every_expert_runs_from_its_layer_to_the_end() -> None:
    """6 layers of 16 experts: 16 (6 + 5 + 4 + 3 + 2 + 1) / 6 passes, less the sequences that are not run, and 2."""
    plan = planned("recipes/final_kl.yaml")
    (work,) = plan.footprint.works
    share = routed_share(model_size(planned_config(PARENT).config), 174)
    assert 1 - share == pytest.approx((1 - 2 / 16) ** 174)
    assert work.passes == pytest.approx(56 + 2, rel=1e-6) and work.sequences == 128


def test_short_sequences_are_run_for_few_experts() -> None:
    size = model_size(planned_config(PARENT).config)
    assert routed_share(size, 1) == pytest.approx(2 / 16) and routed_share(size, 2) == pytest.approx(1 - (14 / 16) ** 2)


@pytest.mark.parametrize("gpus", [8, 16])
def test_passes_of_a_large_parent_and_its_memory_on_more_gpus(gpus: int) -> None:
    """36 layers of 128 experts; what a process holds depends on its share of the tokens only."""
    words = (*LARGE, f"--gpus={gpus}", "--gpu=H100")
    found = planned("recipes/final_kl.yaml", *words).footprint
    (work,) = found.works
    assert 1800 < work.passes <= 128 * 37 / 2 + 2
    (experts,) = [dict(phase.parts) for phase in found.phases if phase.name == "experts"]
    assert experts["weights"] == pytest.approx(found.phases[0].peak_bytes, rel=0.5) and experts["weights"] < 40 * GIB
    assert found.host["sequences that are run"] == 36 * 128 * 12_000 / gpus  # a bool each
    assert found.disk["states entering a layer"] == 12_000 * 8192 * 2880 * 2


def test_a_combination_takes_nothing_but_numbers() -> None:
    found = planned("recipes/combine_importance.yaml").footprint
    assert sum(found.disk.values()) == 8 * 96 and found.peak_bytes == 3 * 8 * 96
