"""The interface through which every part of the project samples from a model; imports no torch.

Implementations: `TransformersEngine` and `VLLMEngine`; `lit_puzzle.generation.load` makes one from settings and a
checkpoint folder. Reads and writes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lit_puzzle.generation.sampling import Sampling


@dataclass(frozen=True)
class Completion:
    """What a model generated after one prompt.

    Args:
        token_ids: generated tokens, the end token included.
        finish: `stop` if the last token is an end token, `length` if the cap ended the completion.
        logprobs: for each token its log-probability under the model's softmax at temperature 1 over the whole
            vocabulary, whatever it was drawn from; None unless `Sampling.logprobs` asked for it.
    """

    token_ids: list[int]
    finish: Literal["stop", "length"]
    logprobs: list[float] | None = None


class Engine(Protocol):
    """A model that is ready to generate."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int] | None = None
    ) -> list[Completion]:
        """Return one completion for each prompt, in the order of the prompts.

        Args:
            prompts: token ids of each prompt, rendered at its own reasoning effort.
            sampling: how tokens are drawn.
            rows: number of each prompt, 0 or more; None: 0, 1, 2, ... A completion is drawn with random numbers of
                (seed, row, position) and does not depend on which prompts are generated beside it. Prompts with equal
                numbers share random numbers: samples of one prompt need different ones.

        Raises:
            ValueError: an empty prompt, a negative row, or not as many rows as prompts.
        """
        ...


def check_prompts(prompts: Sequence[Sequence[int]], rows: Sequence[int] | None) -> Sequence[int]:
    """Return the number of each prompt.

    Raises:
        ValueError: an empty prompt, a negative row, or not as many rows as prompts.
    """
    numbers = range(len(prompts)) if rows is None else rows
    if len(numbers) != len(prompts):
        raise ValueError(f"{len(numbers)} rows were given for {len(prompts)} prompts; each prompt needs one.")
    if any(number < 0 for number in numbers):
        raise ValueError(f"Rows must be 0 or more; the smallest given is {min(numbers)}.")
    empty = next((place for place, prompt in enumerate(prompts) if len(prompt) == 0), None)
    if empty is not None:
        raise ValueError(f"Prompt {empty} is empty; a model needs at least one token to continue.")
    return numbers
