"""What one block costs, sums of it, and what they come to for a whole model: plain numbers, no arithmetic of their own.

Reads and writes nothing. `lit_puzzle.costs.cost_model` fills both in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lit_puzzle.costs.serving import Deployment


@dataclass(frozen=True)
class BlockCost:
    """What one block, or a sum of them, costs.

    Attributes:
        parameters: Numbers that it holds, however they are stored.
        active_parameters: Those at work on one token.
        weight_bytes: On each GPU.
        kv_bytes: On each GPU for each request in flight, mean over the request's life.
        prefill_seconds: For each request.
        decode_seconds: For each step, mean over the request's life.
    """

    parameters: int
    active_parameters: int
    weight_bytes: float
    kv_bytes: float
    prefill_seconds: float
    decode_seconds: float

    def __add__(self, other: BlockCost) -> BlockCost:
        return BlockCost(
            self.parameters + other.parameters,
            self.active_parameters + other.active_parameters,
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
            self.prefill_seconds + other.prefill_seconds,
            self.decode_seconds + other.decode_seconds,
        )

    def times(self, count: int) -> BlockCost:
        """The cost of `count` equal blocks."""
        return BlockCost(
            count * self.parameters,
            count * self.active_parameters,
            count * self.weight_bytes,
            count * self.kv_bytes,
            count * self.prefill_seconds,
            count * self.decode_seconds,
        )


@dataclass(frozen=True)
class Prediction:
    """A whole model in one deployment at one batch size.

    Attributes:
        tokens_per_second: Generated tokens a second of all replicas together.
        latency_seconds: Of one request, from its prompt's first chunk to its last token.
        step_seconds: One decode step, mean over the request's life.
        memory_gib: Weights and KV cache on all GPUs.
        fits: Whether weights and KV cache fit the GPUs.
        parameters: Of the model.
        active_parameters: Those at work on one token; the embedding, of which one row is read, does not count.
        batch_size: Requests in flight in each replica.
        deployment: How the GPUs share the work.
    """

    tokens_per_second: float
    latency_seconds: float
    step_seconds: float
    memory_gib: float
    fits: bool
    parameters: int
    active_parameters: int
    batch_size: int
    deployment: Deployment

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value."""
        return dataclasses.asdict(self)
