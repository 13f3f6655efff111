"""The times to the first and to each further token in a busy engine: a closed loop of requests, step by step.

Reads and writes nothing. C clients each send a request, wait for its last token and send the next. The engine is
vLLM's scheduler with chunked prefill and asynchronous scheduling:

    arrival    sent + request_seconds + P token_seconds        the server parses, tokenizes, answers
    step       D sequences decode one token each; up to `chunk_tokens` - D prompt tokens are read beside them, oldest
               first, while fewer than `sequences` requests are in the engine; seconds: decode(D) + read(tokens)
    schedule   a step is put together when the one before it starts: a prompt that arrives waits for the running step
               and for the scheduled one
    first      end of the step that reads the prompt's last token
    further    (end of the step of the last token - first) / (generated - 1)

So a prompt waits for the rest of a step, for one more, and for prompts that came before it; the first C wait for each
other. With one client and an idle engine this is arrival + read(P). Steps between two events are taken at once: the
cost is linear in requests, not in tokens.

Source: vLLM 0.13, `vllm/v1/core/sched/scheduler.py` and `vllm/v1/engine/core.py` (`step_with_batch_queue`).
Legend: P prompt tokens, C clients, D decoding sequences.
"""

import heapq
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FrontEnd:
    """Seconds of a request outside the engine.

    Args:
        request_seconds: of any request: HTTP, queues between processes, the first token's way back.
        token_seconds: of each prompt token: tokenization.

    Both are fitted to public measurements; `scripts/bench/first_token_fit.py` says to which and how well.
    """

    request_seconds: float = 0.008
    token_seconds: float = 3e-6

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"FrontEnd: {name} must not be negative, got {value!r}")


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step's two halves.

    Attributes:
        decode: by the number of sequences, from 1.
        read: by the number of prompt tokens, from 1 to `chunk_tokens`.
        chunk_tokens: most tokens of a step.
        sequences: most requests in the engine; others wait outside.
    """

    decode: Callable[[int], float]
    read: Callable[[int], float]
    chunk_tokens: int
    sequences: int


@dataclass(frozen=True)
class Latency:
    """Mean seconds over requests.

    Attributes:
        first_token: from sending a request to its first token.
        output_token: between its tokens; 0 where no request generates two.
    """

    first_token: float
    output_token: float


class _Loop:
    """State of the simulation; requests are named by their index."""

    def __init__(self, prompts: Sequence[int], generated: Sequence[int], times: StepTimes, front: FrontEnd) -> None:
        self.prompts, self.generated, self.times, self.front = prompts, generated, times, front
        self.now, self.steps = 0.0, 0
        self.sent: list[float] = []
        self.first: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.arriving: list[tuple[float, int]] = []  # heap of time of arrival and request
        self.waiting: list[list[int]] = []  # request and prompt tokens left to read, oldest first
        self.decoding: list[tuple[int, int]] = []  # heap of last step and request

    def send(self) -> None:
        """Send the next request, if one is left."""
        request = len(self.sent)
        if request < len(self.prompts):
            self.sent.append(self.now)
            delay = self.front.request_seconds + self.front.token_seconds * self.prompts[request]
            heapq.heappush(self.arriving, (self.now + delay, request))

    def admit(self) -> None:
        """Queue the requests that have arrived."""
        while self.arriving and self.arriving[0][0] <= self.now:
            request = heapq.heappop(self.arriving)[1]
            self.waiting.append([request, self.prompts[request]])

    def schedule(self, sequences: int) -> tuple[int, list[int]]:
        """Return the prompt tokens of the next step beside `sequences`, and the requests whose prompts they end."""
        budget, read, ended = self.times.chunk_tokens - sequences, 0, list[int]()
        while self.waiting and read < budget and sequences + len(ended) < self.times.sequences:
            left = self.waiting[0][1]
            tokens = min(left, budget - read)
            read += tokens
            if tokens < left:
                self.waiting[0][1] -= tokens
            else:
                ended.append(self.waiting.pop(0)[0])
        return read, ended

    def skip(self, seconds: float) -> int:
        """Return how many equal steps of `seconds` pass until a sequence ends or a request arrives."""
        steps = self.decoding[0][0] - self.steps
        if self.arriving:
            steps = min(steps, max(1, math.ceil((self.arriving[0][0] - self.now) / seconds)))
        return steps

    def end(self, seconds: float, steps: int, ended: Sequence[int]) -> None:
        """Pass `steps` steps: give the requests `ended` their first token, and replace those that got their last."""
        self.now += steps * seconds
        self.steps += steps
        for request in ended:
            self.first[request] = self.now
            heapq.heappush(self.decoding, (self.steps + self.generated[request] - 1, request))
        while self.decoding and self.decoding[0][0] <= self.steps:
            self.last[heapq.heappop(self.decoding)[1]] = self.now
            self.send()
        self.admit()


def closed_loop(
    prompts: Sequence[int], generated: Sequence[int], clients: int, times: StepTimes, front: FrontEnd | None = None
) -> Latency:
    """Return the mean seconds to the first token and between tokens.

    Args:
        prompts: prompt tokens of every request, in the order in which they are sent.
        generated: tokens that each generates.
        clients: requests in flight.
        times: seconds of a step.
        front: seconds outside the engine; None: the fitted ones.

    Raises:
        ValueError: there is no request or no client, a length is below 1, steps have no room for prompts, or a step's
            seconds are not positive and finite.
    """
    if not prompts or len(prompts) != len(generated) or not all(n >= 1 for n in (*prompts, *generated, clients)):
        raise ValueError("closed_loop: give as many prompts as completions, all lengths and clients at least 1")
    if not 1 <= times.sequences < times.chunk_tokens:
        raise ValueError(
            f"closed_loop: {times.sequences} sequences and steps of {times.chunk_tokens} tokens; give at least one "
            "sequence, and room for prompts beside them"
        )
    loop = _Loop(prompts, generated, times, front or FrontEnd())
    for _ in range(clients):
        loop.send()
    read, ended = 0, list[int]()
    while len(loop.last) < len(prompts):
        sequences = len(loop.decoding)
        next_read, next_ended = loop.schedule(sequences + len(ended))
        if read or sequences:
            seconds = (times.decode(sequences) if sequences else 0.0) + (times.read(read) if read else 0.0)
            if not 0 < seconds < math.inf:
                raise ValueError(
                    f"closed_loop: a step of {sequences} sequences and {read} prompt tokens takes {seconds!r} seconds; "
                    "they must be positive and finite"
                )
            loop.end(seconds, 1 if read or next_read else loop.skip(seconds), ended)
        elif not next_read:
            loop.now = loop.arriving[0][0]
            loop.admit()
        read, ended = next_read, next_ended
    between = [
        (loop.last[request] - first) / (generated[request] - 1)
        for request, first in loop.first.items()
        if generated[request] > 1
    ]
    return Latency(
        statistics.fmean(loop.first[request] - sent for request, sent in enumerate(loop.sent)),
        statistics.fmean(between) if between else 0.0,
    )
