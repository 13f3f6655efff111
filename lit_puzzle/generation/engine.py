"""The interface through which every part of the project samples from a model; imports no torch.

Implementations: `TransformersEngine` and `VLLMEngine`; `lit_puzzle.generation.load` makes one from settings and a
checkpoint folder. Reads and writes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.run.stopped_training import TrainingStoppedError


@dataclass(frozen=True)
class Completion:
    """What a model generated after one prompt.

    Args:
        token_ids: generated tokens, the end token included.
        finish: `stop` if the last token is an end token, `length` if the cap ended the completion.
        logprobs: for each token its log-probability under the model's softmax at temperature 1 over the whole
            vocabulary, whatever it was drawn from; None unless `Sampling.logprobs` asked for it.
        seconds: from the call of `generate` to the last token, waiting included; takes no part in comparisons.
        routes: experts that each token was routed to (tokens, layers, top-k), prompt included and the last token left
            out, of an engine that was asked for them.
    """

    token_ids: list[int]
    finish: Literal["stop", "length"]
    logprobs: list[float] | None = None
    seconds: float | None = field(default=None, compare=False)
    routes: NDArray[np.integer] | None = field(default=None, compare=False)


OnCompletion = Callable[[int, Completion], None]  # number of a prompt (its row), and its completion


class EngineFailedError(TrainingStoppedError):
    """An engine beside a training failed, or is not to be trusted: the run stops, with its state saved."""


class Engine(Protocol):
    """A model that is ready to generate."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        rows: Sequence[int] | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[Completion]:
        """Return one completion for each prompt, in the order of the prompts.

        Args:
            prompts: token ids of each prompt, rendered at its own reasoning effort.
            sampling: how tokens are drawn.
            rows: number of each prompt, from 0 to 2^64 - 1; None: 0, 1, 2, ... A completion is drawn with random
                numbers of (seed, row, position) and does not depend on which prompts are generated beside it. Prompts
                with equal numbers share random numbers: samples of one prompt need different ones.
            on_completion: called in this process with each completion that has ended, as soon as it is here, in any
                order.

        Raises:
            ValueError: an empty prompt, one that leaves no room for `max_new_tokens`, a row out of range, or not as
                many rows as prompts.
        """
        ...


def check_prompts(
    prompts: Sequence[Sequence[int]], rows: Sequence[int] | None, max_new_tokens: int, context_tokens: int
) -> Sequence[int]:
    """Return the number of each prompt.

    Args:
        prompts: token ids of each prompt.
        rows: number of each prompt; None: 0, 1, 2, ...
        max_new_tokens: cap on the tokens of a completion.
        context_tokens: what the model can read.

    Raises:
        ValueError: an empty prompt, one that leaves no room for `max_new_tokens`, a row out of range, or not as many
            rows as prompts.
    """
    numbers = range(len(prompts)) if rows is None else rows
    if len(numbers) != len(prompts):
        raise ValueError(f"{len(numbers)} rows were given for {len(prompts)} prompts; each prompt needs one.")
    if not all(0 <= number < 2**64 for number in numbers):
        raise ValueError(f"Rows must be from 0 to 2^64 - 1; those given are from {min(numbers)} to {max(numbers)}.")
    for place, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"Prompt {place} is empty; a model needs at least one token to continue.")
        if len(prompt) + max_new_tokens > context_tokens:
            raise ValueError(
                f"Prompt {place} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} it exceeds the context "
                f"of {context_tokens} tokens. Shorten it, or give a smaller max_new_tokens."
            )
    return numbers
