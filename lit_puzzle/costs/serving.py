"""What is served and how: the shape of a model, its blocks, how GPUs share it, the engine, and who knows the seconds.

Reads and writes nothing. `KernelTimes` is the one interface of all sources of seconds: a roofline
(`lit_puzzle.costs.roofline`), measured GPU kernels (`lit_puzzle.costs.measured_kernels`) and blocks timed
on the machine at hand (`lit_puzzle.costs.timed_blocks`).

Source: arXiv 2602.11937 for blocks and deployments. Every setting of `ServingEngine` names its own source.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from lit_puzzle.model.layout import layer_blocks, whole
from lit_puzzle.spec import Scenario


@dataclass(frozen=True)
class ModelShape:
    """The sizes that all layers of parent and child share."""

    hidden: int
    intermediate: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    experts_per_token: int
    attention_bias: bool = True
    tied_embeddings: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The shape in the plain dict of a `config.json`.

        Raises:
            ValueError: When a size is missing or no positive whole number.
        """
        return cls(
            hidden=whole(config, "hidden_size"),
            intermediate=whole(config, "intermediate_size"),
            num_query_heads=whole(config, "num_attention_heads"),
            num_kv_heads=whole(config, "num_key_value_heads"),
            head_dim=whole(config, "head_dim"),
            vocab=whole(config, "vocab_size"),
            experts_per_token=whole(config, "num_experts_per_tok"),
            attention_bias=bool(config.get("attention_bias", True)),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )


@dataclass(frozen=True)
class Block:
    """One layer as far as costs go: its number of experts and its window (None is full attention)."""

    num_experts: int
    window_tokens: int | None


def parent_blocks(config: Mapping[str, Any]) -> tuple[Block, ...]:
    """The blocks of the checkpoint whose `config.json` this is."""
    return tuple(Block(experts, window) for experts, window in layer_blocks(config))


@dataclass(frozen=True)
class Deployment:
    """How the GPUs of a scenario share the work.

    Attributes:
        tensor_parallel: GPUs of one replica, which share every matrix of attention and head.
        expert_parallel: Groups among them that each hold whole experts; 1 splits every expert over all of them.
        replicas: Independent copies of the model.
    """

    tensor_parallel: int
    expert_parallel: int
    replicas: int


@dataclass(frozen=True)
class ServingEngine:
    """Settings and habits of the serving engine: vLLM 0.24, the release whose kernels the public tables measured.

    The memory model is the one that aiconfigurator-core 0.12.0 uses for vLLM (`sdk/backends/base_backend.py`,
    `vllm_backend.py`, `trtllm_backend.py`, `systems/*.yaml`), so none of its numbers is ours:

        usable = memory x memory_utilization x (1 - memory_tolerance) - reserved - collectives - activations
        activations = 2 bytes x activation_factor x chunk_tokens x query heads x head_dim

    Attributes:
        max_sequences: Most requests in flight in one replica (`max_num_seqs`). None: the device's own number in
            gpus.json, which names its source.
        chunk_tokens: Most prompt tokens read in one step (`max_num_batched_tokens`): 8192 by the same function, for the
            API server.
        graph_sequences: Most sequences that a CUDA graph decodes (`max_cudagraph_capture_size`): vLLM captures 512.
        memory_utilization: Share of the memory that the engine manages (`gpu_memory_utilization`): 0.92 since vLLM
            0.22, before 0.9 (`VLLM_GPU_MEMORY_UTILIZATION_BY_VERSION`).
        memory_tolerance: Lost to the granularity of cache pages (`KV_CACHE_MEMORY_TOLERANCE`).
        reserved_gib: CUDA, its libraries and what is not counted elsewhere (`other_mem`, the same for every GPU).
        collectives_gib: Buffers of collectives when ranks share a model (`nccl_mem`: 0.33 GiB for 2 ranks, 0.38 GiB
            for 4 and 8; the larger is taken).
        activation_factors: For 1, 2, and 4 or more ranks (`ACTIVATION_COEFFICIENTS["MOE"]`).
        step_overhead_seconds: Time of the CPU per step that the GPU waits for: scheduling, inputs, outputs. The weakest
            constant, an assumption: vllm-project/vllm issue 10634 (2024) reports gaps of 5-6 ms between steps at 256
            sequences, expects 2-3 ms from better code and 0.2-0.3 ms from asynchronous scheduling.
        sampling_bytes: Memory traffic per sequence and entry of the vocabulary to turn logits into a token, counted in
            vLLM's sampler: to float32 (2 + 4), temperature (4 + 4), softmax (4 + 4), exponential noise (4), division
            (8 + 4), argmax (4), plus writing the bfloat16 logits (2).
        small_kernels: Kernels per layer that no table measures and that are bound by launch and memory: two norms with
            their residuals, the rotation of queries and keys, and the write to the cache.
        small_kernel_seconds: Constant latency of each (`mem_empirical_constant_latency`: 3 microseconds).
        small_kernel_bandwidth: Share of the peak bandwidth that they reach (`mem_bw_empirical_scaling_factor`).
    """

    max_sequences: int | None = None
    chunk_tokens: int = 8192
    graph_sequences: int = 512
    memory_utilization: float = 0.92
    memory_tolerance: float = 0.02
    reserved_gib: float = 3.5
    collectives_gib: float = 411041792 / 2**30
    activation_factors: tuple[float, float, float] = (22.0, 13.0, 10.0)
    step_overhead_seconds: float = 0.002
    sampling_bytes: float = 44.0
    small_kernels: int = 4
    small_kernel_seconds: float = 3e-6
    small_kernel_bandwidth: float = 0.8

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation_factors", tuple(self.activation_factors))
        counts = {"chunk_tokens": self.chunk_tokens}
        if self.max_sequences is not None:
            counts["max_sequences"] = self.max_sequences
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"Engine: {name} must be a whole number of at least 1, got {count!r}")
        if not 0 < self.memory_utilization <= 1 or not 0 <= self.memory_tolerance < 1:
            raise ValueError(
                "Engine: memory_utilization must be in (0, 1] and memory_tolerance in [0, 1), got "
                f"{self.memory_utilization!r} and {self.memory_tolerance!r}"
            )
        if len(self.activation_factors) != 3:
            raise ValueError(f"Engine: activation_factors must be 3 numbers, got {self.activation_factors!r}")
        for name, value in dataclasses.asdict(self).items():
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(math.isfinite(number) and number >= 0 for number in values):
                raise ValueError(f"Engine: {name} must not be negative, got {value!r}")

    def usable_bytes(self, memory_gib: float, model: ModelShape, tensor_parallel: int) -> float:
        """Bytes of one GPU of `memory_gib` that weights and KV cache may take; the formula is above."""
        factor = self.activation_factors[min(tensor_parallel.bit_length() - 1, 2)]
        activations = 2 * factor * self.chunk_tokens * model.num_query_heads * model.head_dim
        reserved_gib = self.reserved_gib + (self.collectives_gib if tensor_parallel > 1 else 0.0)
        managed_gib = memory_gib * self.memory_utilization * (1 - self.memory_tolerance)
        return (managed_gib - reserved_gib) * 2**30 - activations


@dataclass(frozen=True, eq=False)
class Setting:
    """What a source of seconds is asked about: which model, where, how shared, by which engine.

    Told apart by identity, so that a source can look up what it knows about one thousands of times a second.
    """

    model: ModelShape
    scenario: Scenario
    deployment: Deployment
    engine: ServingEngine


class KernelTimes(Protocol):
    """A source of seconds. All times are of one replica; a layer's include the all-reduces of its ranks.

    `Any` below lets an implementation annotate its own types, as text (`from __future__ import annotations`) or not:
    recipes compare annotations to the letter. `setting` is a `Setting`, `block` a `Block`, `context_tokens` a float,
    the other numbers are int; all return a float but `check`, which returns nothing.
    """

    name: ClassVar[str]

    def check(self, setting: Any) -> Any:
        """Raise ValueError when this source knows nothing about the setting."""

    def decode_layer(self, setting: Any, block: Any, batch_size: Any, context_tokens: Any) -> Any:
        """Seconds of one decode step of one layer, for sequences that each attend to `context_tokens`."""

    def prefill_layer(self, setting: Any, block: Any, prompt_tokens: Any) -> Any:
        """Seconds to read one prompt through one layer, in the engine's chunks."""

    def decode_rest(self, setting: Any, batch_size: Any) -> Any:
        """Seconds of one decode step outside the layers: embedding, last norm, head, sampling, the engine itself."""

    def prefill_rest(self, setting: Any, prompt_tokens: Any) -> Any:
        """Seconds outside the layers to read one prompt."""
