"""Draws of tokens inside vLLM, with random numbers of (seed, row, position): a logits processor of Model Runner V1.

vLLM decodes greedily; before it does, the logit of the token that `draw_tokens` draws is set to infinity. vLLM's own
generators are not used: their state depends on what else is decoded, and on a CPU one that has to be rewound (its
prompt was read in parts) kills the engine.

The position of a draw is the number of tokens that the request has generated. It is right
- while a prompt is read in parts: vLLM samples after each part at position 0 and discards all but the last token;
- after preemption: vLLM adds the request again with the tokens that it has, or drops one and draws it again;
- with asynchronous scheduling: tokens not yet known are placeholders, which count;
- with tensor parallelism: every process draws the same token from the same gathered logits.
Speculative decoding verifies several positions at once: vLLM refuses it together with a processor like this one.

Imported by vLLM in its worker processes. Reads and writes nothing. Memory: that of `draw_tokens`, and one copy of the
logits. Shapes: B requests, N of them with the same settings, V vocabulary.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from lit_puzzle.generation.draws import draw_tokens, uniforms
from lit_puzzle.generation.sampling import Sampling

UNIFORMS = 64  # random numbers of a request that are made at once
ARGUMENT = "lit_puzzle_draw"


def draw_argument(sampling: Sampling, row: int) -> dict[str, list[int | float]]:
    """Return the `extra_args` of a request that `SeededDraws` draws for."""
    return {ARGUMENT: [sampling.seed, row, sampling.temperature, sampling.top_p]}


@dataclass
class Request:
    """A request in vLLM's batch.

    Args:
        seed: of its random numbers.
        row: number of its prompt.
        temperature: divides the logits; 0 is greedy.
        top_p: mass of the most likely tokens that are drawn from.
        token_ids: generated so far; vLLM's own list, which grows.
        numbers: random numbers of positions `start` and after.
        start: position of the first of them.
    """

    seed: int
    row: int
    temperature: float
    top_p: float
    token_ids: list[int]
    numbers: NDArray[np.float64] | None = None
    start: int = 0

    def uniform(self) -> float:
        """Return the random number of the next token."""
        position = len(self.token_ids)
        start = position - position % UNIFORMS
        if self.numbers is None or self.start != start:
            self.numbers, self.start = uniforms(self.seed, self.row, start, UNIFORMS), start
        return float(self.numbers[position - start])


class SeededDraws(LogitsProcessor):
    """Leaves vLLM's greedy choice the token that was drawn for each request with a `draw_argument`.

    Args:
        vllm_config: of the engine; not read.
        device: of the logits; not read.
        is_pin_memory: whether vLLM pins its buffers; not read.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.requests: dict[int, Request] = {}  # by place in the batch

    def is_argmax_invariant(self) -> bool:
        """Return False: vLLM would skip the processor for greedy requests."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that entered, left or changed places."""
        process_dict_updates(self.requests, batch_update, new_request)

    def apply(self, logits_BV: Tensor) -> Tensor:
        """Return the logits, infinite at the tokens that were drawn.

        Raises:
            ValueError: logits are not finite.
        """
        same: dict[tuple[float, float], list[int]] = defaultdict(list)
        for place, request in self.requests.items():
            same[request.temperature, request.top_p].append(place)
        for (temperature, top_p), places in same.items():
            uniform_N = torch.tensor([self.requests[place].uniform() for place in places], dtype=torch.float64)
            place_N = torch.tensor(places, device=logits_BV.device)
            logits_NV = logits_BV[place_N]
            if not bool(logits_NV.amax(-1).isfinite().all()):  # a NaN is the largest of its row
                raise ValueError(
                    "The model's logits are not finite: its weights are damaged, or overflow in their dtype."
                )
            logits_BV[place_N, draw_tokens(logits_NV, temperature, top_p, uniform_N)] = torch.inf
        return logits_BV


def new_request(params: SamplingParams, prompt_ids: list[int] | None, token_ids: list[int]) -> Request | None:
    """Return the state of a request; None for one that vLLM decodes by itself."""
    if ARGUMENT not in (params.extra_args or {}):
        return None
    seed, row, temperature, top_p = params.extra_args[ARGUMENT]
    return Request(seed, row, temperature, top_p, token_ids)
