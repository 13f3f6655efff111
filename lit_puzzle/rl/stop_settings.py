"""When reinforcement learning stops because its numbers run away; the state before that update is saved.

    KL       mean over tokens of KL(policy, child before training), where the loss has it (`loss.beta` above 0)
    clipped  share of tokens whose importance ratio, policy to policy that generated, is beyond the clip range

Both are those of the loss of a slice, over all processes (`train/kl`, `train/clip_ratio/region_mean`). What else stops
a run: a loss or weights that are not finite (`lit_puzzle.training.finite`), and a difference between vLLM and the
policy (`rollouts.max_mismatch`). Reads and writes nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_puzzle.run.stopped_training import TrainingStoppedError

Limit = tuple[str, str, float | None, str, str]  # setting, TRL's metric, largest value, the metric in words, advice


@dataclass(frozen=True)
class StopSettings:
    """Limits beyond which a run stops; a stopped run resumes with higher ones.

    Args:
        max_kl: largest KL divergence to the child before training, in nats a token; null: no limit.
        max_clipped: largest share of tokens with a clipped importance ratio; null: no limit.

    Raises:
        ValueError: a limit that is not a positive number.
    """

    max_kl: float | None = 10.0
    max_clipped: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("max_kl", self.max_kl), ("max_clipped", self.max_clipped)):
            if limit is not None and not 0 < limit < math.inf:
                raise ValueError(f"grpo.stop.{name} is {limit}; a finite number above 0 is needed, or null: no limit.")

    def check(self, metrics: Mapping[str, Sequence[float]], update: int) -> None:
        """Check the newest values of TRL's metrics, which are the same on all processes.

        Args:
            metrics: values by name since the last update.
            update: number of the update, counted from 1.

        Raises:
            TrainingStoppedError: one is beyond its limit.
        """
        kl, clipped = "KL divergence to the child before training", "share of clipped tokens"
        limits: tuple[Limit, ...] = (
            ("max_kl", "kl", self.max_kl, kl, "a larger grpo.loss.beta"),
            ("max_clipped", "clip_ratio/region_mean", self.max_clipped, clipped, "fewer grpo.num_iterations"),
        )
        for setting, key, limit, name, advice in limits:
            values = metrics.get(key, ())
            if limit is not None and values and not values[-1] <= limit:  # true for NaN
                raise TrainingStoppedError(
                    f"The {name} is {values[-1]:.3g} at update {update}; grpo.stop.{setting} allows {limit:g}. The "
                    f"state before this update is saved: the same command resumes with a higher grpo.stop.{setting} "
                    f"(null: no limit). Or start again with --overwrite, a lower learning rate or {advice}."
                )
