"""Kernel times from a roofline: every kernel takes the time of its memory traffic or of its arithmetic, the longer one.

Reads `gpus.json` (peaks of the devices). Each kind of kernel reaches a named share of the peaks:

    attention      max(cached bytes / (attention_bandwidth x bandwidth), 4 B Q c / (dense_arithmetic x flops))
    experts        max(bytes of the distinct experts / (expert_bandwidth x bandwidth),
                       6 B k H I / (expert_arithmetic x flops))
    dense          max(weight bytes / (dense_bandwidth x bandwidth), 2 B x weights / (dense_arithmetic x flops))
    all-reduce     link_seconds + 2 (T - 1) / T x 2 B H / (communication x link)
    launches       kernels_per_layer x launch_seconds

The shares are those that the kernels of vLLM 0.24 reach on an H100 in the tables of aiconfigurator-core 0.12.0
(`lit_puzzle.costs.measured_kernels`), each from one or two rows that its argument names; none was fitted to a
throughput. Every other device is predicted with the same shares.

Source: S. Williams et al., "Roofline", 2009, for the model.
Legend: B sequences of a decode step or tokens of a prompt's chunk, c context, Q query heads x head_dim, H hidden, I
intermediate, k experts per token, T ranks of tensor parallelism.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from lit_puzzle.costs.accounting import distinct_experts
from lit_puzzle.costs.gpus import Gpu, find_gpu
from lit_puzzle.costs.serving import Block, Setting
from lit_puzzle.spec import KV_DTYPE_BYTES, WEIGHT_BITS


@dataclass(frozen=True)
class Roofline:
    """A `KernelTimes` for any device whose peaks are known.

    Args:
        attention_bandwidth: table generation_attention, fp8, 64 query and 8 key-value heads of 64, 32 sequences: the
            268 MB between contexts of 8192 and 16384 take 0.1081 ms.
        expert_bandwidth: table moe, MXFP4, hidden and intermediate size 2880, 64 tokens balanced over 128 experts of
            which each takes 4: 1.69 GB in 0.689 ms.
        expert_arithmetic: table moe, the same at 8192 tokens: 1.63 TFLOP in 2.93 ms, 556 TFLOP/s.
        dense_bandwidth: table gemm, bfloat16, m 1, n 65536, k 2560: 336 MB in 0.1142 ms.
        dense_arithmetic: table gemm, bfloat16, m 8192, n 5120, k 2560: 770 TFLOP/s.
        communication: all-reduce of 2^28 bfloat16 values on 8 GPUs in 2.117 ms is bound by 444 GB/s, of 2^20 values in
            0.0194 ms by 189 GB/s; decode sends the smaller kind.
        kernels_per_layer: kernels that a step launches per layer: attention, its two products, router, experts (two
            products), two norms, rotation, cache write.
        launch_seconds: `mem_empirical_constant_latency` of aiconfigurator-core's systems: 3 microseconds.

    Raises:
        ValueError: a share is outside (0, 1], or a launch constant is negative.
    """

    name: ClassVar[str] = "roofline"
    attention_bandwidth: float = 0.74
    expert_bandwidth: float = 0.73
    expert_arithmetic: float = 0.56
    dense_bandwidth: float = 0.88
    dense_arithmetic: float = 0.78
    communication: float = 0.42
    kernels_per_layer: int = 10
    launch_seconds: float = 3e-6

    def __post_init__(self) -> None:
        for name, share in dataclasses.asdict(self).items():
            if name in ("kernels_per_layer", "launch_seconds"):
                if share < 0:
                    raise ValueError(f"Roofline: {name} must not be negative, got {share!r}")
            elif not 0 < share <= 1:
                raise ValueError(f"Roofline: {name} is a share of a peak and must be in (0, 1], got {share!r}")

    def check(self, setting: Setting) -> None:
        """Check that the device is known and has the arithmetic of the scenario's number formats.

        Raises:
            ValueError: it is not, or has not.
        """
        gpu = find_gpu(setting.scenario.gpu)
        _flops(gpu, setting.scenario.weight_dtype)
        _flops(gpu, setting.scenario.expert_dtype)

    def decode_layer(self, setting: Setting, block: Block, batch_size: int, context_tokens: float) -> float:
        """Return the seconds of one decode step of one layer; attention reads min(context, window) tokens."""
        attended = min(context_tokens, block.window_tokens or context_tokens)
        return self._attention(setting, batch_size * attended, batch_size * attended) + self._products(
            setting, block, batch_size
        )

    def prefill_layer(self, setting: Setting, block: Block, prompt_tokens: int) -> float:
        """Return the seconds to read one prompt: its chunks in order, each attending to the tokens before it."""
        seconds, chunk = 0.0, setting.engine.chunk_tokens
        for start in range(0, prompt_tokens, chunk):
            tokens = min(chunk, prompt_tokens - start)
            pairs = attended_pairs(start + tokens, block.window_tokens) - attended_pairs(start, block.window_tokens)
            cached = min(start, block.window_tokens or start) + tokens
            seconds += self._attention(setting, cached, pairs) + self._products(setting, block, tokens)
        return seconds

    def decode_rest(self, setting: Setting, batch_size: int) -> float:
        """Return the seconds of head, sampling, their communication, and the engine's overhead."""
        return self._ends(setting, batch_size, batch_size) + setting.engine.step.overhead_seconds

    def prefill_rest(self, setting: Setting, prompt_tokens: int) -> float:
        """Return the seconds outside the layers; the head sees the last token only, overhead is counted in decode."""
        return self._ends(setting, prompt_tokens, 1)

    def _attention(self, setting: Setting, cached_tokens: float, pairs: float) -> float:
        gpu, model, ranks = find_gpu(setting.scenario.gpu), setting.model, setting.deployment.tensor_parallel
        heads = -(-model.num_kv_heads // ranks)
        cached_bytes = cached_tokens * 2 * heads * model.head_dim * KV_DTYPE_BYTES[setting.scenario.kv_dtype]
        operations = 4 * pairs * model.num_query_heads * model.head_dim / ranks
        return max(
            cached_bytes / (self.attention_bandwidth * gpu.memory_bytes_per_second),
            operations / (self.dense_arithmetic * _flops(gpu, setting.scenario.weight_dtype)),
        )

    def _products(self, setting: Setting, block: Block, tokens: int) -> float:
        """Return the seconds of everything in a layer but attention itself, for that many tokens."""
        gpu, model, ranks = find_gpu(setting.scenario.gpu), setting.model, setting.deployment.tensor_parallel
        queries, heads = model.num_query_heads * model.head_dim / ranks, -(-model.num_kv_heads // ranks)
        attention = model.hidden * (2 * queries + 2 * heads * model.head_dim)
        seconds = self._dense(setting, tokens, attention + block.num_experts * model.hidden)
        distinct = distinct_experts(block.num_experts, model.experts_per_token, tokens)
        matrices = 3 * model.hidden * model.intermediate / ranks
        seconds += max(
            distinct * matrices * WEIGHT_BITS[setting.scenario.expert_dtype] / 8
            / (self.expert_bandwidth * gpu.memory_bytes_per_second),
            2 * tokens * min(block.num_experts, model.experts_per_token) * matrices
            / (self.expert_arithmetic * _flops(gpu, setting.scenario.expert_dtype)),
        )  # fmt: skip
        seconds += self.kernels_per_layer * self.launch_seconds
        return seconds + 2 * self._all_reduce(setting, tokens)

    def _dense(self, setting: Setting, tokens: int, weights: float) -> float:
        gpu, dtype = find_gpu(setting.scenario.gpu), setting.scenario.weight_dtype
        return max(
            weights * WEIGHT_BITS[dtype] / 8 / (self.dense_bandwidth * gpu.memory_bytes_per_second),
            2 * tokens * weights / (self.dense_arithmetic * _flops(gpu, dtype)),
        )

    def _all_reduce(self, setting: Setting, tokens: int) -> float:
        gpu, ranks = find_gpu(setting.scenario.gpu), setting.deployment.tensor_parallel
        if ranks == 1:
            return 0.0
        sent = 2 * (ranks - 1) / ranks * 2 * tokens * setting.model.hidden
        return gpu.link_seconds + sent / (self.communication * gpu.link_bytes_per_second)

    def _ends(self, setting: Setting, tokens: int, sampled: int) -> float:
        gpu, model, ranks = find_gpu(setting.scenario.gpu), setting.model, setting.deployment.tensor_parallel
        seconds = self._dense(setting, sampled, model.vocab * model.hidden / ranks) + self._all_reduce(setting, tokens)
        step = setting.engine.step
        sampling = sampled * model.vocab * step.sampling_bytes
        seconds += sampling / (step.small_kernel_bandwidth * gpu.memory_bytes_per_second)
        if ranks > 1:  # every rank gathers the logits of all
            gathered = (ranks - 1) / ranks * 2 * sampled * model.vocab
            seconds += gpu.link_seconds + gathered / (self.communication * gpu.link_bytes_per_second)
        return seconds


def attended_pairs(tokens: int, window_tokens: int | None) -> float:
    """Return the pairs of query and key when `tokens` are read from the start: each attends to itself and before."""
    window = min(tokens, window_tokens or tokens)
    return window * (window + 1) / 2 + (tokens - window) * window


def _flops(gpu: Gpu, dtype: str) -> float:
    """Return the peak FLOP/s with inputs of `dtype`; MXFP4 weights are multiplied with bfloat16 inputs."""
    known = {"fp8": gpu.fp8_flops, "float32": gpu.float32_flops}
    flops = known.get(dtype, gpu.bfloat16_flops)
    if flops is None:
        raise ValueError(f"gpus.json has no {dtype} arithmetic for {gpu.name}; choose bfloat16, or add it there")
    return flops
