"""Settings of rollouts, as recipes hold them: what generates completions while a model trains. Imports no torch.

    rho = p_policy(token) / p_engine(token)   of the same token, under two implementations of the same weights

Reads and writes nothing. Source of the corrections: truncated and masked importance sampling, as in TRL 1.16.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

RolloutEngineName = Literal["transformers", "vllm", "server"]
EngineDtype = Literal["auto", "float32", "bfloat16"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"]
MAX_MISMATCH = {"float32": 0.01, "bfloat16": 0.1}  # of `RolloutSettings.max_mismatch`, by the dtype of the engine


@dataclass(frozen=True)
class ImportanceSampling:
    """What corrects the loss for rho.

    Args:
        mode: rho of each token, or of a whole completion, limited to [clip_min, clip_max] (`truncate`) or 0 outside of
            it (`mask`); `none`: no correction.
        clip_min: lower limit of rho; None: none.
        clip_max: upper limit of rho; None: none.

    Raises:
        ValueError: another mode, or limits that leave out 1.
    """

    mode: Correction = "token_truncate"
    clip_min: float | None = None
    clip_max: float | None = 3.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Correction):
            raise ValueError(f"importance_sampling.mode is {self.mode!r}; allowed: {list(get_args(Correction))}.")
        low, high = self.clip_min or 0.0, math.inf if self.clip_max is None else self.clip_max
        if not 0 <= low <= 1 <= high or low == high:
            raise ValueError(
                f"importance_sampling.clip_min={self.clip_min}, clip_max={self.clip_max} were given; 0 <= clip_min <= "
                "1 <= clip_max is needed, not both 1, or null."
            )


@dataclass(frozen=True)
class RolloutSettings:
    """What generates completions during training, and how far its log-probabilities may be from the policy's.

    Args:
        engine: `transformers` generates with the model that trains; `vllm` with an engine beside it, which gets the
            trained weights after every update; `server` with engines of vLLM on other GPUs, which get them too
            (`lit_puzzle.generation.rollout_server`). Validation and evaluation of the run use the same.
        dtype: of vLLM's weights; `auto`: bfloat16 where training computes in it, else float32.
        tensor_parallel: processes that share one engine, which then has the GPUs of all of them.
        gpu_memory_share: share of a GPU's memory that vLLM takes while it generates; released while training.
        kv_cache_gib: size of vLLM's KV cache; None: what `gpu_memory_share` leaves, 4 GiB on a CPU.
        context_tokens: longest prompt and completion together, for one of which the KV cache must have room; None: what
            the model can read.
        importance_sampling: what corrects the loss for rho.
        max_mismatch: largest allowed mean of |log rho| over the tokens of a rollout, beyond which the run stops; None:
            0.01 in float32, 0.1 in bfloat16.
        engine_seconds: longest time in which an engine that works generates no token at all.
        replay_routes: trains on the experts that the engine chose for each token (GPUs only).

    Raises:
        ValueError: another value of a choice, or numbers out of range.
    """

    engine: RolloutEngineName = "transformers"
    dtype: EngineDtype = "auto"
    tensor_parallel: int = 1
    gpu_memory_share: float = 0.3
    kv_cache_gib: float | None = None
    context_tokens: int | None = None
    importance_sampling: ImportanceSampling = ImportanceSampling()
    max_mismatch: float | None = None
    engine_seconds: float = 600.0
    replay_routes: bool = False

    def __post_init__(self) -> None:
        choices = {
            "engine": (self.engine, get_args(RolloutEngineName)),
            "dtype": (self.dtype, get_args(EngineDtype)),
        }
        for name, (given, allowed) in choices.items():
            if given not in allowed:
                raise ValueError(f"rollouts.{name} is {given!r}; allowed: {list(allowed)}.")
        positive = {
            "tensor_parallel": self.tensor_parallel,
            "kv_cache_gib": self.kv_cache_gib,
            "context_tokens": self.context_tokens,
            "max_mismatch": self.max_mismatch,
            "engine_seconds": self.engine_seconds,
        }
        for name, number in positive.items():
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"rollouts.{name} is {number}; a finite number above 0 is needed.")
        if not 0 < self.gpu_memory_share < 1:
            raise ValueError(f"rollouts.gpu_memory_share is {self.gpu_memory_share}; needed is above 0 and below 1.")
        if self.engine != "vllm" and (self.replay_routes or self.tensor_parallel > 1):
            raise ValueError(
                "rollouts.replay_routes and tensor_parallel need rollouts.engine: vllm; transformers "
                "generates with the model that trains, a server shares its own GPUs and sends no routes."
            )

    def mismatch_bound(self, dtype: str) -> float:
        """Return the largest allowed mean of |log rho| for an engine of this dtype."""
        return MAX_MISMATCH[dtype] if self.max_mismatch is None else self.max_mismatch
