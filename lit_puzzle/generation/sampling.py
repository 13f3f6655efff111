"""How a parent's answers are drawn, and where they end; needs torch and transformers alone.

    p(next token) = softmax(logits / temperature), cut to the smallest set of tokens with mass >= top_p; temperature 0
    is greedy.

Reads and writes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_puzzle.generation.batches import Answer

Answers = Callable[[Sequence[list[int]], int], list[Answer]]  # prompts and a seed -> answers, in their order


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        max_new_tokens: An answer is cut off there.
        temperature: 0 is greedy.
        top_p: Mass of the most likely tokens that are drawn from.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens}, temperature {self.temperature}, top_p {self.top_p} were given; "
                "needed are at least 1, at least 0, and above 0 up to 1."
            )


def cut_at_end(token_ids: list[int], end_ids: Sequence[int]) -> Answer:
    """Generated tokens up to the first end token, which stays, and whether there is one."""
    stop = next((index for index, token in enumerate(token_ids) if token in end_ids), None)
    return (token_ids, False) if stop is None else (token_ids[: stop + 1], True)
