"""Settings of the stage `assemble`, without torch: recipes are parsed with these classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


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
            raise ValueError("experts is given without importance; name the run folder of recipes/importance.yaml")
