"""The cost of a block or of a sum of blocks, and the prediction for a whole model: plain numbers.

Reads and writes nothing. `lit_puzzle.costs.cost_model` computes both.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lit_puzzle.costs.serving import Deployment


@dataclass(frozen=True)
class BlockCost:
    """The cost of one block, or of a sum of blocks.

    Attributes:
        parameters: number of parameters, however they are stored.
        active_parameters: parameters that one token uses.
        weight_bytes: bytes of weights on each GPU.
        kv_bytes: bytes of keys and values on each GPU for each request in flight, mean over the request's steps, before
            an engine's padding (`CostModel.kv_demand`).
        prefill_seconds: time to read one prompt.
        decode_seconds: time of one decode step, mean over the request's steps.
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
        """Return the cost of `count` equal blocks."""
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
    """The predicted costs of a whole model in one deployment at one batch size.

    Attributes:
        tokens_per_second: generated tokens a second of all replicas together.
        latency_seconds: time of one request, from its prompt's first chunk to its last token.
        step_seconds: time of one decode step, mean over the request's steps.
        memory_gib: weights and KV cache on all GPUs.
        fits: whether weights and KV cache fit the GPUs.
        parameters: number of parameters of the model.
        active_parameters: parameters that one token uses, without the embedding (one row of it is read).
        batch_size: requests in flight in each replica.
        deployment: how the GPUs share the work.
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
        """Return a plain JSON value."""
        return dataclasses.asdict(self)
