"""A run folder that two processes want, that a signal stops, or whose training checkpoints are damaged."""

import signal
from pathlib import Path

import pytest

from faults.case import Trials
from faults.damage import all_of, cut, write
from faults.interruptions import Interruptions
from faults.world import OUT

NEWEST, OLDEST = f"{OUT}/checkpoints/step=2.ckpt", f"{OUT}/checkpoints/step=1.ckpt"
TRAININGS = ("distill", "distill_blocks", "rl_recover")
PICKLE = b"cos\nsystem\n(S'touch escaped'\ntR."


@pytest.fixture(scope="module")
def interruptions(trials: Trials) -> Interruptions:
    return Interruptions(trials)


def test_two_starts_of_one_run_folder(interruptions: Interruptions) -> None:
    assert interruptions.at_once("library") == ""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["generate", "score", "search", "distill", "rl_recover", "evaluate"])
def test_a_second_start_is_refused(interruptions: Interruptions, stage: str) -> None:
    assert interruptions.together(stage) == ""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["generate", "distill"])
def test_overwrite_of_a_run_that_is_running_is_refused(interruptions: Interruptions, stage: str) -> None:
    assert interruptions.together(stage, "--overwrite") == ""


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAININGS)
def test_a_damaged_newest_checkpoint_falls_back(interruptions: Interruptions, stage: str) -> None:
    folder, end = interruptions.changed_after(stage, "run.json", cut(NEWEST + "/__0_0.distcp", 0.5))
    assert end.status == 0, end.said
    assert "step=2.ckpt" in end.said
    assert interruptions.difference(stage, folder) == ""


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAININGS)
def test_only_damaged_checkpoints_are_one_error(interruptions: Interruptions, stage: str) -> None:
    both = all_of(
        *(cut(f"{folder}/{name}", 0.5) for folder in (NEWEST, OLDEST) for name in ("__0_0.distcp", "meta.pt"))
    )
    _, end = interruptions.changed_after(stage, "run.json", both)
    assert (end.status, end.has_traceback) == (2, False), end.said
    assert "checkpoints" in end.said[end.said.rfind("error: ") :]


@pytest.mark.slow
@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
def test_a_pickle_in_a_checkpoint_is_not_executed(interruptions: Interruptions, name: str) -> None:
    damage = all_of(write(f"{NEWEST}/{name}", PICKLE), write(f"{OLDEST}/{name}", PICKLE))
    folder, end = interruptions.changed_after("distill", "run.json", damage)
    assert not any(Path(folder).rglob("escaped"))
    assert (end.status, end.has_traceback) == (2, False), end.said


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAININGS)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_a_training_that_resumes(
    interruptions: Interruptions, stage: str, number: int, status: int
) -> None:
    assert interruptions.terminated(stage, "checkpoints/step=1.ckpt/meta.pt", number, status) == ""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["generate", "score"])
def test_a_signal_stops_a_stage_that_resumes(interruptions: Interruptions, stage: str) -> None:
    assert interruptions.terminated(stage, "config.yaml", signal.SIGTERM, 143, -signal.SIGTERM) == ""
