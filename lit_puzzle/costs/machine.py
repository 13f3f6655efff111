"""Where layers are timed, and which combinations of sizes.

Reads and writes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Machine:
    """Where and how layers are run.

    Args:
        device: `cpu` or `cuda`.
        dtype: number format of weights, hidden states and cache.
        attention: attention implementation of transformers.
        experts: experts implementation of transformers.
        copies: number of layers with different weights that are run in a row.
        rounds: number of measurements of every point.
    """

    device: str
    dtype: torch.dtype
    attention: str = "eager"
    experts: str = "grouped_mm"
    copies: int = 4
    rounds: int = 7

    def random(self, *shape: int) -> Tensor:
        """Draw normal random numbers of this machine's dtype."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Points:
    """What is measured: every combination; windows with contexts up to the window only.

    Args:
        experts: expert counts.
        windows: attention windows in tokens; None is full attention.
        batches: sequences of a decode step.
        contexts: tokens in the cache, that of the step included.
        prompts: tokens of a prompt.

    Raises:
        ValueError: a list is empty or has a number that cannot be measured.
    """

    experts: Sequence[int]
    windows: Sequence[int | None]
    batches: Sequence[int]
    contexts: Sequence[int]
    prompts: Sequence[int]

    def __post_init__(self) -> None:
        least = {"experts": 1, "batches": 1, "contexts": 2, "prompts": 1}
        given = {"experts": self.experts, "batches": self.batches, "contexts": self.contexts, "prompts": self.prompts}
        for name, values in given.items():
            if not values or min(values) < least[name]:
                raise ValueError(f"{name} must be numbers of at least {least[name]}, got {list(values)}.")
        if not self.windows or min(2 if window is None else window for window in self.windows) < 2:
            raise ValueError(f"windows must be numbers of at least 2, or none; got {list(self.windows)}.")

    def contexts_of(self, window: int | None) -> list[int]:
        """Return the contexts to measure; a step takes the same time at all contexts from the window on."""
        if window is None:
            return sorted(set(self.contexts))
        return sorted({min(context, window) for context in [*self.contexts, window]})
