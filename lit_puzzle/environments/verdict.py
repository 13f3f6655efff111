"""The verdict on a completion: a grade from 0 to 1, the reason for it, and what else was seen.

Reads and writes nothing. Needs no torch.
"""

from dataclasses import dataclass

FAILED = "grader failed"
UNCLEAR = "unclear answer"


@dataclass(frozen=True)
class Verdict:
    """The grade of a completion.

    Attributes:
        correct: 1.0 right, 0.0 wrong, or a share.
        reason: `right`, `partly right`, `wrong`, `unclear answer`, `no final answer`, `cut off`, or `grader failed:
            ...`; a grader may say more after a colon (`wrong: test 3 of 12: time limit`).
        analysis: whether thinking stands before the answer; None if the format does not tell them apart.
        looping: whether the completion ends in a loop (`lit_puzzle.environments.looping`); None if not known.
        rewards: value of each reward by its name, before weighting, where the completion was trained on.
    """

    correct: float
    reason: str
    analysis: bool | None = None
    looping: bool | None = None
    rewards: dict[str, float] | None = None

    @property
    def failed(self) -> bool:
        """Whether the grader, not the completion, is what failed."""
        return self.reason.startswith(FAILED)


RIGHT = Verdict(1.0, "right")
WRONG = Verdict(0.0, "wrong")


def verdict_of(correct: bool) -> Verdict:
    """Return the verdict of a comparison."""
    return RIGHT if correct else WRONG


def verdict_of_grade(grade: float) -> Verdict:
    """Return the verdict of a grade from 0 to 1."""
    if grade == 1:
        return RIGHT
    return Verdict(grade, "partly right" if grade else "wrong")


def grader_failed(why: str) -> Verdict:
    """Return the verdict when a grader fails; it counts as 0 and is counted."""
    return Verdict(0.0, f"{FAILED}: {' '.join(why.split())[:200]}")
