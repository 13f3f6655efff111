"""Settings of the serving check, as recipes hold them. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class VLLMSettings:
    """The environment of vLLM and its engines.

    Args:
        python: interpreter of vLLM's environment (`scripts/vllm_env.sh` prints it).
        dtype: float32 compares exactly; bfloat16 is for GPUs and for models that do not fit otherwise.
        kv_cache_gib: size of the KV cache.
        server: whether the HTTP server is checked too.
        server_seconds: longest time in which the server has to start.

    Raises:
        ValueError: a size or time that is not positive.
    """

    python: Path = Path(".venv-vllm/bin/python")
    dtype: Literal["float32", "bfloat16"] = "float32"
    kv_cache_gib: float = 0.25
    server: bool = True
    server_seconds: float = 600.0

    def __post_init__(self) -> None:
        if min(self.kv_cache_gib, self.server_seconds) <= 0:
            raise ValueError(
                f"kv_cache_gib {self.kv_cache_gib} and server_seconds {self.server_seconds} were given; both must be "
                "positive."
            )


@dataclass(frozen=True)
class CheckPrompts:
    """The prompts of the serving check.

    Args:
        count: number of prompts of random tokens, which are continued and scored.
        tokens: length of each; windows that are wider are not exercised.
        new_tokens: number of greedy tokens after each.
        question: question for the chat template, rendered at each reasoning effort.

    Raises:
        ValueError: a number below 1.
    """

    count: int = 8
    tokens: int = 96
    new_tokens: int = 48
    question: str = "What is 2 + 3?"

    def __post_init__(self) -> None:
        if min(self.count, self.tokens, self.new_tokens) < 1:
            raise ValueError(
                f"count {self.count}, tokens {self.tokens} and new_tokens {self.new_tokens} were given; all must be "
                "positive."
            )
