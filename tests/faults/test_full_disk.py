"""A disk that is full: one message with file and reason; with room again, the same command ends right.

No file may grow beyond a size, which needs no superuser: a longer write fails as on a full disk (EFBIG for ENOSPC).
"""

import random

import pytest

from faults.case import Trials
from faults.interruptions import Interruptions
from faults.world import STAGES

SEED = 5


@pytest.fixture(scope="module")
def interruptions(trials: Trials) -> Interruptions:
    return Interruptions(trials)


@pytest.mark.slow
def test_a_full_disk(interruptions: Interruptions) -> None:
    assert interruptions.full_disk("library", 1000)[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_a_full_disk(interruptions: Interruptions, stage: str) -> None:
    largest = interruptions.whole(stage).largest
    for file_bytes in (0, random.Random(f"{SEED} {stage}").randrange(1, largest)):
        where, wrong = interruptions.full_disk(stage, file_bytes)
        assert wrong == "", where
