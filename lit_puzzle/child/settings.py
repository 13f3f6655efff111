"""Settings of the stages `assemble` and `average`, without torch: recipes are parsed with these classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lit_puzzle.evaluate.held_out import HeldOut
from lit_puzzle.generation.sampling import EngineSettings, Sampling

Packed = Literal["refuse", "dequantize"]  # what is done with MXFP4 experts that differ


@dataclass(frozen=True)
class ManualPlan:
    """A plan given by numbers instead of a search; the default keeps every expert and every window of the parent.

    Args:
        importance: folder of the parent's importance scores; needed with `experts`.
        experts: number of experts that every layer keeps (those with the highest scores), or a list with one number
            per layer; None keeps all.
        windows: layer -> sliding window in tokens; the other layers keep theirs.

    Raises:
        ValueError: only one of `importance` and `experts` is given.
    """

    importance: Path | None = None
    experts: int | list[int] | None = None
    windows: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.experts is None and self.importance is not None:
            raise ValueError("importance is given without experts; say how many experts each layer keeps")
        if self.experts is not None and self.importance is None:
            raise ValueError("experts is given without importance; name the run folder of recipes/final_kl.yaml")


@dataclass(frozen=True)
class Sweep:
    """Averages of several shares, each measured on the same held-out problems.

    Args:
        held_out: the problems.
        shares: shares of the first checkpoint, from 0 (the second alone) to 1 (the first alone).
        sampling: how completions are drawn.
        engine: what runs the models.

    Raises:
        ValueError: no share, one twice, or one out of range.
    """

    held_out: HeldOut
    shares: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    sampling: Sampling = Sampling(temperature=0.0)  # noqa: RUF009  (frozen)
    engine: EngineSettings = EngineSettings()  # noqa: RUF009

    def __post_init__(self) -> None:
        for share in self.shares:
            check_share("sweep.shares", share)
        if not self.shares or len(set(self.shares)) < len(self.shares):
            raise ValueError(f"sweep.shares {self.shares} were given; at least one is needed, and none of them twice.")
        self.sampling.refuse_logprobs("An average")


def check_share(key: str, share: float) -> None:
    """Check that a share is a number from 0 to 1.

    Raises:
        ValueError: it is not; the message names the key.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"{key} {share} was given; a share of the first checkpoint is a number from 0 to 1.")
