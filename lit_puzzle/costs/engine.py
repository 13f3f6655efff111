"""The serving engine as far as costs go: its scheduler's limits, the memory that it reserves, and its time per step.

Reads and writes nothing. Defaults describe vLLM 0.24, the release whose kernels the public tables measured; every
number names its source below.

    usable = memory x utilization x (1 - tolerance) - reserved - collectives - activations        bytes of each GPU
    activations = 2 bytes x activation_factor x chunk_tokens x query heads x head_dim

Source: the memory model is the one that aiconfigurator-core 0.12.0 uses for vLLM (`sdk/backends/base_backend.py`,
`vllm_backend.py`, `trtllm_backend.py`, `systems/*.yaml`); none of its numbers was changed.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from lit_puzzle.costs.kv_layout import KVAllocation

GIB = 2**30


@dataclass(frozen=True)
class EngineMemory:
    """Memory of a GPU that weights and KV cache may not use.

    Args:
        utilization: share of the memory that the engine manages (`gpu_memory_utilization`): 0.92 since vLLM 0.22,
            before 0.9 (`VLLM_GPU_MEMORY_UTILIZATION_BY_VERSION`).
        tolerance: share lost to the granularity of cache pages (`KV_CACHE_MEMORY_TOLERANCE`).
        reserved_gib: CUDA, its libraries and what is not counted elsewhere (`other_mem`, the same for every GPU).
        collectives_gib: buffers of collectives when ranks share a model (`nccl_mem`: 0.33 GiB for 2 ranks, 0.38 GiB
            for 4 and 8; the larger is taken).
        activation_factors: for 1, 2, and 4 or more ranks (`ACTIVATION_COEFFICIENTS["MOE"]`).

    Raises:
        ValueError: a share is outside its range, a number is negative, or there are not three activation factors.
    """

    utilization: float = 0.92
    tolerance: float = 0.02
    reserved_gib: float = 3.5
    collectives_gib: float = 411041792 / 2**30
    activation_factors: tuple[float, float, float] = (22.0, 13.0, 10.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation_factors", tuple(self.activation_factors))
        if not 0 < self.utilization <= 1 or not 0 <= self.tolerance < 1:
            raise ValueError(
                "EngineMemory: utilization must be in (0, 1] and tolerance in [0, 1), got "
                f"{self.utilization!r} and {self.tolerance!r}"
            )
        if len(self.activation_factors) != 3:
            raise ValueError(f"EngineMemory: activation_factors must be 3 numbers, got {self.activation_factors!r}")
        factors = {f"activation_factors[{index}]": factor for index, factor in enumerate(self.activation_factors)}
        gib = {"reserved_gib": self.reserved_gib, "collectives_gib": self.collectives_gib}
        _check_not_negative(self, gib | factors)


@dataclass(frozen=True)
class EngineStep:
    """Time of an engine step beside the large kernels.

    Args:
        overhead_seconds: time of the CPU per step that the GPU waits for: scheduling, inputs, outputs.
            vllm-project/vllm issue 10634 expects 0.2-0.3 ms from asynchronous scheduling, vLLM's default since; in 2024
            it reports gaps of 5-6 ms between steps at 256 sequences. The rest overlaps with the GPU.
        sampling_bytes: memory traffic per sequence and entry of the vocabulary to turn logits into a token, counted in
            vLLM's sampler: to float32 (2 + 4), temperature (4 + 4), softmax (4 + 4), exponential noise (4), division
            (8 + 4), argmax (4), plus writing the bfloat16 logits (2).
        small_kernels: kernels per layer that no table measures and that are bound by launch and memory: two norms with
            their residuals, the rotation of queries and keys, and the write to the cache.
        small_kernel_seconds: constant latency of each (`mem_empirical_constant_latency`: 3 microseconds).
        small_kernel_bandwidth: share of the peak bandwidth that they reach (`mem_bw_empirical_scaling_factor`).

    Raises:
        ValueError: a number is negative.
    """

    overhead_seconds: float = 0.0002
    sampling_bytes: float = 44.0
    small_kernels: int = 4
    small_kernel_seconds: float = 3e-6
    small_kernel_bandwidth: float = 0.8

    def __post_init__(self) -> None:
        _check_not_negative(self, dataclasses.asdict(self))


@dataclass(frozen=True)
class ServingEngine:
    """Settings of the serving engine.

    Args:
        max_sequences: most requests in flight in one replica (`max_num_seqs`). None: the device's own number in
            gpus.json, which names its source.
        chunk_tokens: most prompt tokens read in one step (`max_num_batched_tokens`): 8192 for the API server
            (`EngineArgs.get_batch_defaults`).
        graph_sequences: most sequences that a CUDA graph decodes (`max_cudagraph_capture_size`): vLLM captures 512.
        memory: memory that weights and KV cache may not use.
        kv: how the KV cache is allocated.
        step: time of a step beside the large kernels.

    Raises:
        ValueError: a count is not a whole number of at least 1, or `graph_sequences` is negative.
    """

    max_sequences: int | None = None
    chunk_tokens: int = 8192
    graph_sequences: int = 512
    memory: EngineMemory = field(default_factory=EngineMemory)
    kv: KVAllocation = field(default_factory=KVAllocation)
    step: EngineStep = field(default_factory=EngineStep)

    def __post_init__(self) -> None:
        counts = {"chunk_tokens": self.chunk_tokens}
        if self.max_sequences is not None:
            counts["max_sequences"] = self.max_sequences
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"ServingEngine: {name} must be a whole number of at least 1, got {count!r}")
        _check_not_negative(self, {"graph_sequences": self.graph_sequences})

    def usable_bytes(self, memory_gib: float, attention_channels: int, tensor_parallel: int) -> float:
        """Return the bytes of one GPU that weights and KV cache may use; the formula is above.

        Args:
            memory_gib: memory of the GPU.
            attention_channels: query heads x head_dim of the model.
            tensor_parallel: ranks that share one layer.
        """
        memory = self.memory
        factor = memory.activation_factors[min(tensor_parallel.bit_length() - 1, 2)]
        activations = 2 * factor * self.chunk_tokens * attention_channels
        reserved_gib = memory.reserved_gib + (memory.collectives_gib if tensor_parallel > 1 else 0.0)
        managed_gib = memory_gib * memory.utilization * (1 - memory.tolerance)
        return (managed_gib - reserved_gib) * GIB - activations


def _check_not_negative(owner: object, numbers: dict[str, float]) -> None:
    for name, number in numbers.items():
        if not math.isfinite(number) or number < 0:
            raise ValueError(f"{type(owner).__name__}: {name} must not be negative, got {number!r}")
