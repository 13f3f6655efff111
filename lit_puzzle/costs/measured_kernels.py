"""Kernel times from measured GPU kernels: a layer is the sum of its kernels as vLLM launches them.

Reads the tables of `aiconfigurator-core` (extra `gpu-tables`) through `lit_puzzle.costs.attention_laws` and
`lit_puzzle.costs.kernel_laws`, which state the laws that extrapolate them; reads only what a deployment needs, once per
process.

    decode layer     attention + products (queries, keys and values; output; router) + experts + 2 all-reduces
                     + small kernels
    prefill layer    attention of the whole prompt + the rest for each chunk
    decode rest      head + gathering of the logits + sampling + the embedding's all-reduce + the engine's overhead
    small kernels    count x latency + bytes / (share x bandwidth): norms 16 H bytes a token, rotation 4 (Q + K), cache
                     4 K and 2 K of the cache's format

Decode runs in CUDA graphs up to `graph_sequences`, prefill does not: collectives were measured with and without graphs.

Source: aiconfigurator-core 0.12.0 for the kernels and, in its `sdk/models/moe.py`, for which kernels make up a layer
(not its code). It has no layers that differ from each other; here every layer is a block of its own.
Legend: H hidden, Q query heads x head_dim of one rank, K key-value heads x head_dim of one rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import ClassVar

from lit_puzzle.costs.attention_laws import DecodeAttention, PrefillAttention
from lit_puzzle.costs.gpus import find_gpu
from lit_puzzle.costs.kernel_laws import Experts, Products, load_products
from lit_puzzle.costs.kernel_tables import Curve, System, find_system, read_rows
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.serving import Block, Deployment, Setting
from lit_puzzle.spec import KV_DTYPE_BYTES

BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class Collectives:
    """Seconds of collectives by number of bfloat16 values; all None for a single rank."""

    all_reduce_graph: Curve | None
    all_reduce_eager: Curve | None
    all_gather: Curve | None

    @classmethod
    def load(cls, system: System, ranks: int) -> Collectives:
        """Read what was measured between `ranks` GPUs of a node. The tables count values, not bytes."""
        if ranks == 1:
            return cls(None, None, None)
        path = f"{system.folder}/comm/vllm/{system.vllm}/custom_allreduce_perf.parquet"
        reduce_rows = read_rows(path, ("backend", "message_size"), (("num_gpus", "=", ranks),))
        nccl = f"{system.folder}/comm/nccl/{system.nccl}/nccl_perf.parquet"
        filters = (("num_gpus", "=", ranks), ("op_name", "=", "all_gather"), ("nccl_dtype", "=", "half"))
        gathered = dict(read_rows(nccl, ("message_size",), filters))
        graph, eager = (
            Curve.of(
                f"{path} ({ranks} GPUs)", "values", {size: time for kind, size, time in reduce_rows if kind == name}
            )
            for name in ("vllm_graph", "vllm_eager")
        )
        return cls(graph, eager, Curve.of(f"{nccl} ({ranks} GPUs)", "values", gathered))

    def reduce(self, values: float, graph: bool) -> float:
        """Return the seconds to add up `values` numbers of every rank."""
        curve = self.all_reduce_graph if graph else self.all_reduce_eager
        return curve.at(values) if curve else 0.0

    def gather(self, values: float) -> float:
        """Return the seconds to gather `values` numbers, of which each rank holds an equal part, on every rank."""
        return self.all_gather.at(max(values, self.all_gather.sizes[0])) if self.all_gather else 0.0


@dataclass(frozen=True)
class Kernels:
    """All kernels of one setting.

    Attributes:
        decode_attention: attention of one decode step.
        prefill_attention: attention of one prompt.
        experts: routing and experts.
        products: products with plain matrices.
        collectives: all-reduce and all-gather.
        expert_flops: FLOP/s that the experts reach at most.
        tabulated: cached sums of tables by number of experts, tokens and whether in a graph; shared by all settings
            that differ only in prompt, batch and engine.
        layers: the same with the engine's small kernels, for this setting alone.
    """

    decode_attention: DecodeAttention
    prefill_attention: PrefillAttention
    experts: Experts
    products: Products
    collectives: Collectives
    expert_flops: float = math.inf
    tabulated: dict[tuple[int, int, bool], float] = field(default_factory=dict)
    layers: dict[tuple[int, int, bool], float] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasuredKernels:
    """A `KernelTimes` for the GPUs whose kernels NVIDIA measured and published.

    Args:
        distribution: how the tokens of the measurement were spread over experts: balanced, power_law_1.01 or
            power_law_1.2. The default is aiconfigurator-core's own.
        expert_inputs: number format that the experts multiply: bfloat16, vLLM's default, or mxfp8, which a B200 has and
            `VLLM_USE_FLASHINFER_MOE_MXFP4_MXFP8=1` turns on.
        expert_flops: FLOP/s of each GPU that the experts reach at most, for an engine with a slower kernel than the
            measured one, such as Marlin (`VLLM_MXFP4_USE_MARLIN=1`) on an H100; None: as measured.

    Raises:
        ValueError: `expert_inputs` is neither, or `expert_flops` is not positive.
    """

    name: ClassVar[str] = "measured kernels"
    distribution: str = "power_law_1.01"
    expert_inputs: str = "bfloat16"
    expert_flops: float | None = None

    def __post_init__(self) -> None:
        if self.expert_inputs not in ("bfloat16", "mxfp8"):
            raise ValueError(f"MeasuredKernels: expert_inputs must be bfloat16 or mxfp8, got {self.expert_inputs!r}")
        if self.expert_flops is not None and not self.expert_flops > 0:
            raise ValueError(f"MeasuredKernels: expert_flops must be positive, got {self.expert_flops!r}")

    def check(self, setting: Setting) -> None:
        """Read the tables that the setting needs.

        Raises:
            ValueError: a kernel was not measured in this setting.
        """
        _kernels(setting, self)

    def decode_layer(self, setting: Setting, block: Block, batch_size: int, context_tokens: float) -> float:
        """Return the seconds of one decode step of one layer."""
        kernels = _kernels(setting, self)
        attention = kernels.decode_attention.at(block.window_tokens, batch_size, context_tokens)
        return attention + _besides_attention(
            kernels, setting, block.num_experts, batch_size, _in_graph(setting, batch_size)
        )

    def prefill_layer(self, setting: Setting, block: Block, prompt_tokens: int) -> float:
        """Return the seconds to read one prompt through one layer, chunk by chunk."""
        kernels = _kernels(setting, self)
        seconds = kernels.prefill_attention.at(block.window_tokens, prompt_tokens)
        for tokens in _chunks(setting, prompt_tokens):
            seconds += _besides_attention(kernels, setting, block.num_experts, tokens, graph=False)
        return seconds

    def decode_rest(self, setting: Setting, batch_size: int) -> float:
        """Return the seconds of the head, sampling and the engine's overhead."""
        collectives, graph = (
            _kernels(setting, self).collectives,
            _in_graph(setting, batch_size),
        )
        reduce = collectives.reduce(batch_size * setting.model.hidden, graph)
        return reduce + self._head(setting, batch_size) + setting.engine.step.overhead_seconds

    def prefill_rest(self, setting: Setting, prompt_tokens: int) -> float:
        """Return the seconds outside the layers; the head sees the last token only, overhead is counted in decode."""
        collectives, hidden = _kernels(setting, self).collectives, setting.model.hidden
        reduce = sum(collectives.reduce(tokens * hidden, graph=False) for tokens in _chunks(setting, prompt_tokens))
        return reduce + self._head(setting, 1)

    def _head(self, setting: Setting, sequences: int) -> float:
        kernels, model = _kernels(setting, self), setting.model
        logits = sequences * model.vocab
        seconds = kernels.products.at(model.vocab / setting.deployment.tensor_parallel, model.hidden, sequences)
        seconds += kernels.collectives.gather(logits)
        return seconds + logits * setting.engine.step.sampling_bytes / _small_kernel_bandwidth(setting)


def _in_graph(setting: Setting, batch_size: int) -> bool:
    return batch_size <= setting.engine.graph_sequences


def _chunks(setting: Setting, prompt_tokens: int) -> list[int]:
    whole, last = divmod(prompt_tokens, setting.engine.chunk_tokens)
    return [setting.engine.chunk_tokens] * whole + ([last] if last else [])


@functools.lru_cache(maxsize=64)
def _kernels(setting: Setting, times: MeasuredKernels) -> Kernels:
    scenario = setting.scenario
    dtypes = (scenario.kv_dtype, scenario.weight_dtype, scenario.expert_dtype, times.expert_inputs)
    tables = _load(find_system(scenario.gpu), setting.model, setting.deployment, dtypes, times.distribution)
    if times.expert_flops is not None:
        tables = dataclasses.replace(tables, expert_flops=times.expert_flops, tabulated={})
    return dataclasses.replace(tables, layers={})


@functools.lru_cache(maxsize=256)
def _load(
    system: System, model: ModelShape, deployment: Deployment, dtypes: tuple[str, str, str, str], distribution: str
) -> Kernels:
    """Read the tables, which do not depend on prompt, batch and engine: once per process."""
    ranks, (kv_dtype, weight_dtype, *expert_dtypes) = deployment.tensor_parallel, dtypes
    return Kernels(
        DecodeAttention.load(system, model, ranks, kv_dtype),
        PrefillAttention.load(system, model, ranks, kv_dtype),
        Experts.load(system, model, deployment, (expert_dtypes[0], expert_dtypes[1]), distribution),
        load_products(system, weight_dtype),
        Collectives.load(system, ranks),
    )


def _besides_attention(kernels: Kernels, setting: Setting, num_experts: int, tokens: int, graph: bool) -> float:
    """Return the seconds of everything in a layer but attention itself, for `tokens` tokens."""
    key = (num_experts, tokens, graph)
    if key in kernels.layers:
        return kernels.layers[key]
    model, ranks = setting.model, setting.deployment.tensor_parallel
    queries, keys = model.num_query_heads * model.head_dim / ranks, -(-model.num_kv_heads // ranks) * model.head_dim
    if key not in kernels.tabulated:
        seconds = kernels.products.at(queries + 2 * keys, model.hidden, tokens)
        seconds += kernels.products.at(model.hidden, queries, tokens)
        seconds += kernels.products.at(num_experts, model.hidden, tokens)
        multiplied = 6 * model.hidden * model.intermediate * model.experts_per_token * tokens / ranks
        seconds += max(kernels.experts.at(num_experts, tokens), multiplied / kernels.expert_flops)
        kernels.tabulated[key] = seconds + 2 * kernels.collectives.reduce(tokens * model.hidden, graph)
    kernels.layers[key] = kernels.tabulated[key] + _small_kernels(setting, queries, keys, tokens)
    return kernels.layers[key]


def _small_kernels(setting: Setting, queries: float, keys: float, tokens: int) -> float:
    step, hidden = setting.engine.step, setting.model.hidden
    moved = 8 * hidden * BFLOAT16_BYTES + 2 * (queries + keys) * BFLOAT16_BYTES + 2 * keys * BFLOAT16_BYTES
    moved += 2 * keys * KV_DTYPE_BYTES[setting.scenario.kv_dtype]
    return step.small_kernels * step.small_kernel_seconds + tokens * moved / _small_kernel_bandwidth(setting)


def _small_kernel_bandwidth(setting: Setting) -> float:
    return setting.engine.step.small_kernel_bandwidth * find_gpu(setting.scenario.gpu).memory_bytes_per_second
