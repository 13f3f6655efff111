"""What is served and how: the blocks of a model, how GPUs share it, and the interface of kernel times.

Reads and writes nothing. `KernelTimes` is the one interface of all sources of times: a roofline
(`lit_puzzle.costs.roofline`), measured GPU kernels (`lit_puzzle.costs.measured_kernels`) and blocks timed on the
machine at hand (`lit_puzzle.costs.timed_blocks`).

Source: arXiv 2602.11937 for blocks and deployments.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from lit_puzzle.costs.engine import ServingEngine
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.model.layout import layer_blocks
from lit_puzzle.spec import Scenario


@dataclass(frozen=True)
class Block:
    """One layer as far as costs go.

    Attributes:
        num_experts: number of its experts.
        window_tokens: window of its attention in tokens; None is full attention.
    """

    num_experts: int
    window_tokens: int | None


def parent_blocks(config: Mapping[str, Any]) -> tuple[Block, ...]:
    """Return the blocks of the checkpoint with this `config.json`, first layer first."""
    return tuple(Block(experts, window) for experts, window in layer_blocks(config))


@dataclass(frozen=True)
class Deployment:
    """How the GPUs of a scenario share the work.

    Attributes:
        tensor_parallel: GPUs of one replica, which share every matrix of attention and head.
        expert_parallel: groups among them that each hold whole experts; 1 splits every expert over all of them.
        replicas: independent copies of the model.
    """

    tensor_parallel: int
    expert_parallel: int
    replicas: int


@dataclass(frozen=True, eq=False)
class Setting:
    """One setting that a source of times is asked about.

    Settings are compared by identity: a source can then cache what it loads for one in a dict, without hashing all of
    its fields thousands of times a second.

    Attributes:
        model: sizes of the model.
        scenario: GPUs, tokens and number formats.
        deployment: how the GPUs share the model.
        engine: settings of the serving engine, with `max_sequences` filled in.
    """

    model: ModelShape
    scenario: Scenario
    deployment: Deployment
    engine: ServingEngine


class KernelTimes(Protocol):
    """A source of times. All times are seconds of one replica; a layer's include the all-reduces of its ranks.

    Arguments and results are annotated with `Any` here so that an implementation may annotate its own types, with or
    without `from __future__ import annotations`: jsonargparse compares annotations literally. `setting` is a `Setting`,
    `block` a `Block`, `context_tokens` a float, the other numbers are int; all methods return a float except `check`,
    which returns nothing.
    """

    name: ClassVar[str]

    def check(self, setting: Any) -> Any:
        """Check that this source can answer for the setting.

        Raises:
            ValueError: it cannot.
        """

    def decode_layer(self, setting: Any, block: Any, batch_size: Any, context_tokens: Any) -> Any:
        """Return the seconds of one decode step of one layer, for sequences that attend to `context_tokens` each."""

    def prefill_layer(self, setting: Any, block: Any, prompt_tokens: Any) -> Any:
        """Return the seconds to read one prompt through one layer, in the engine's chunks."""

    def decode_rest(self, setting: Any, batch_size: Any) -> Any:
        """Return the seconds of one decode step outside the layers: embedding, last norm, head, sampling, engine."""

    def prefill_rest(self, setting: Any, prompt_tokens: Any) -> Any:
        """Return the seconds outside the layers to read one prompt."""
