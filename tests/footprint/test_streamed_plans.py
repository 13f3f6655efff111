"""Plans of parents that are read one layer at a time: the hidden states on disk, and what is read and written."""

import pytest

from lit_puzzle.cli import LIGHTNING_COMMANDS, STAGES
from lit_puzzle.footprint.hours import DISK_BYTES_PER_SECOND, total_seconds
from lit_puzzle.footprint.plan import Plan, make_plan
from lit_puzzle.footprint.table import plan_lines
from lit_puzzle.run.recipe import load_recipe

STATES = "hidden states between layers"
ONE_GPU = "recipes/gpt_oss_120b/one_gpu/"
WIDTH, LAYERS = 2 * 2880, 36  # bytes of a token's state, layers of gpt-oss-120b


def planned(name: str, *words: str) -> Plan:
    recipe = load_recipe(name)
    command = recipe.value("command")
    target = None if command in LIGHTNING_COMMANDS else STAGES[command][0]
    plan = make_plan(recipe, command, target, ["--plan", *words])
    assert plan is not None
    return plan


def test_importance_keeps_two_files_of_states_and_reads_the_parent_once() -> None:
    plan = planned(ONE_GPU + "importance.yaml", "--gpus=1", "--gpu=H100")
    made, tokens = plan.footprint, 12_000 * 8192
    assert made.disk[STATES] == 2 * tokens * WIDTH  # 1.0 TiB
    assert sum(made.traffic.values()) == pytest.approx(65.2e9 + 2 * LAYERS * tokens * WIDTH, rel=1e-3)
    assert total_seconds(made, plan.device) == sum(made.traffic.values()) / DISK_BYTES_PER_SECOND
    assert any(line.strip().startswith("disk, at 2 GB a second") for line in plan_lines(plan))


def test_a_parent_in_memory_has_no_files_and_no_traffic() -> None:
    made = planned(ONE_GPU + "importance.yaml", "--gpu=H200", "--gpus=8", "--model.init_args.memory_gib=null").footprint
    assert STATES not in made.disk and not made.traffic and made.network


@pytest.mark.parametrize(("gib", "files"), [(200, 8), (1000, 44), (1e6, 180 + 18 + 5)])
def test_scores_to_the_end_keep_as_many_files_as_the_disk_may_hold(gib: float, files: int) -> None:
    name = ONE_GPU + "score.yaml"
    made = planned(name, "--gpus=1", "--gpu=H100", f"--scoring.memory.disk_gib={gib}").footprint
    assert made.disk[STATES] == files * 512 * 8192 * WIDTH
    assert "final states" not in made.host


def test_more_disk_means_fewer_readings_of_the_weights_and_too_little_is_said() -> None:
    name, weights = ONE_GPU + "score.yaml", "weights, read once a pass"
    small, large = (planned(name, "--gpu=H100", f"--scoring.memory.disk_gib={gib}").footprint for gib in (200, 1000))
    assert small.traffic[weights] > 5 * large.traffic[weights] > 5 * 65e9
    none = planned(name, "--gpu=H100", "--scoring.memory.disk_gib=100").footprint
    assert any("disk_gib=100 has no room for the 135.0 GiB of one candidate" in text for text in none.refusals)


def test_scores_of_each_layer_take_one_pass_without_logits() -> None:
    made = planned(ONE_GPU + "score.yaml", "--gpu=H100", "--scoring.depth=layer").footprint
    assert made.disk[STATES] == 2 * 512 * 8192 * WIDTH
    assert made.traffic["weights, read once a pass"] == pytest.approx(65.2e9, rel=1e-3)
    assert made.works[0].head_tokens == 0 and made.works[0].passes == pytest.approx(1 + 198 / 36)


def test_calibration_and_logits_count_their_files_too() -> None:
    budget = ("--gpus=1", "--gpu=H100", "--fabric.devices=1", "--fabric.memory_gib=32")
    logits = planned("recipes/gpt_oss_120b/precompute_logits.yaml", *budget).footprint
    assert logits.disk[STATES] == 2 * 4e6 * WIDTH  # of one shard, not of all documents
    assert logits.traffic["weights, read once a pass"] == pytest.approx(250 * 65.2e9, rel=1e-3)
    words = ("--gpus=1", "--gpu=H100", "--model.init_args.memory_gib=32")
    calibration = planned("recipes/gpt_oss_20b/calibrate_kv.yaml", *words).footprint
    assert calibration.disk[STATES] > 0 and calibration.traffic


def test_blocks_hold_one_layer_and_keep_the_states_of_all_updates() -> None:
    plan = planned(ONE_GPU + "distill_blocks.yaml", "--gpus=1", "--gpu=H100")
    made, tokens = plan.footprint, 4000 * 32768
    assert made.disk[STATES] == 2 * tokens * WIDTH
    assert made.host["different batches"] == 16 * tokens
    assert made.traffic["hidden states, read in updates"] == 2 * LAYERS * tokens * WIDTH
    assert made.traffic["weights, read once a pass"] == pytest.approx(65.2e9, rel=1e-3)
    resident = planned("recipes/gpt_oss_120b/distill_blocks.yaml", "--gpus=1", "--gpu=H100").footprint
    assert made.peak_bytes < resident.peak_bytes / 8 and not resident.traffic
    several = planned(ONE_GPU + "distill_blocks.yaml", "--gpus=8", "--gpu=H100", "--trainer.devices=8").footprint
    assert several.refusals == ("memory_gib=64 takes one process, not 8: set trainer.devices: 1.",)
    small = planned(
        ONE_GPU + "distill_blocks.yaml", "--gpus=1", "--gpu=H100", "--model.init_args.memory_gib=10"
    ).footprint
    assert "memory_gib=10 was given; the model needs at least" in small.refusals[0]
