"""Kills: before a random change of the file system, or in the middle of a write; then the same command again."""

import random

import pytest

from faults.case import Trials
from faults.interruptions import Interruptions, kill_points
from faults.world import STAGES, World

SEED = 11
LONG_STAGES = ("distill", "distill_blocks", "rl_recover")


@pytest.fixture(scope="module")
def interruptions(trials: Trials) -> Interruptions:
    return Interruptions(trials)


@pytest.mark.slow
def test_a_killed_run_ends_the_same(interruptions: Interruptions) -> None:
    [number] = kill_points(SEED, "library", len(interruptions.whole("library").changes), 1)
    assert interruptions.killed("library", number)[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_the_same(interruptions: Interruptions, stage: str) -> None:
    changes = len(interruptions.whole(stage).changes)
    assert changes > 3
    for number in kill_points(SEED, stage, changes, 2 if stage in LONG_STAGES else 4):
        where, wrong = interruptions.killed(stage, number)
        assert wrong == "", where


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["distill", "rl_recover"])
def test_the_small_trainings_train(interruptions: Interruptions, world: World, stage: str) -> None:
    """Else the comparison of their results would compare copies of the input."""
    trained = interruptions.whole(stage).files["child/model.safetensors"]
    assert trained != (world.folder / "child" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["generate", "score", "distill"])
def test_a_stage_that_is_killed_twice_ends_the_same(interruptions: Interruptions, stage: str) -> None:
    numbers = kill_points(SEED + 1, stage, len(interruptions.whole(stage).changes), 2)
    where, wrong = interruptions.killed(stage, *reversed(numbers))
    assert wrong == "", where


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["generate", "importance", "assemble", "export", "precompute_logits", "distill"])
def test_a_stage_that_dies_inside_a_write_ends_the_same(interruptions: Interruptions, stage: str) -> None:
    largest = interruptions.whole(stage).largest
    where, wrong = interruptions.torn(stage, random.Random(f"{SEED} {stage}").randrange(1, largest))
    assert wrong == "", where
