"""Settings of the stage `score`, without torch: recipes are parsed with these classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FEWEST_TOKENS = 64  # for fewer, reading the head's weights would take longer than multiplying with them


@dataclass(frozen=True)
class Memory:
    """How much memory a process may use beside the model.

    Args:
        hidden_gib: hidden states entering a layer that are larger than this go to a file in the run folder.
        log_probs_gib: the parent's log-probabilities, if they are larger than this, are computed again for every
            candidate.
        disk_gib: where the parent is read layer by layer, GiB of disk for the hidden states of candidates in flight;
            candidates beyond it take another pass over the layers.
        chunk_logits: tokens x vocabulary of the logits that exist at a time, but at least those of 64 tokens; each
            takes up to 28 bytes. None: 2**19 on a CPU, where they stay in its cache (at a vocabulary of 2,048, half
            the time of 2**21), and 2**26 elsewhere.

    Raises:
        ValueError: a size is negative, or `chunk_logits` is below 1.
    """

    hidden_gib: float = 8.0
    log_probs_gib: float = 1.0
    disk_gib: float = 200.0
    chunk_logits: int | None = None

    def __post_init__(self) -> None:
        if min(self.hidden_gib, self.log_probs_gib, self.disk_gib) < 0 or (self.chunk_logits or 1) < 1:
            raise ValueError(f"memory: sizes must be 0 or more and chunk_logits 1 or more, got {self}")

    def chunk_tokens(self, vocab_size: int, device_type: str) -> int:
        """Return the number of tokens whose logits exist at a time.

        Args:
            vocab_size: logits per token.
            device_type: type of the device that computes them (`cpu`, `cuda`).
        """
        logits = self.chunk_logits or (2**19 if device_type == "cpu" else 2**26)
        return max(FEWEST_TOKENS, logits // vocab_size)


@dataclass(frozen=True)
class ScoringSettings:
    """What is scored, and how.

    Args:
        depth: `end` compares the final hidden states and next tokens; `layer` only what leaves the replaced layer
            (metric `layer_error`), which costs one pass for all candidates.
        pairs: score combinations of experts and window themselves, instead of adding the scores of their halves.
        score_prompts: score the tokens of prompts too, which the parent may never have learned to predict.
        evaluate: candidates that the evaluations are run on: those that change the window only, or all.
        rank_samples: number of sequences, drawn by the stage's `seed`, over which ranks are averaged (all, if there
            are fewer).
        memory: how much memory a process may use beside the model.

    Raises:
        ValueError: `rank_samples` is below 1.
    """

    depth: Literal["end", "layer"] = "end"
    pairs: bool = False
    score_prompts: bool = False
    evaluate: Literal["windows", "all"] = "windows"
    rank_samples: int = 64
    memory: Memory = Memory()

    def __post_init__(self) -> None:
        if self.rank_samples < 1:
            raise ValueError(f"rank_samples must be 1 or more, got {self.rank_samples}")
