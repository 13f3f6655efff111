"""One kernel each: its measured table, and the physical laws that carry it where it was not measured.

Reads through `lit_puzzle.costs.kernel_tables`. Where no law is stated, outside the measured range is a
ValueError.

    decode attention    moves the cache through the GPU, so time grows linearly in cached tokens: a batch measured up to
                        some context goes on with the slope of its last two contexts, up to 131072 tokens. A window
                        that was not measured costs what full attention costs at min(context, window).
    prefill attention   arithmetic, in pairs of query and key. Chunks of one prompt add up to the prompt read at once.
                        Full: beyond the longest measured prompt p, seconds(p) (n / p)^2. A measured window: on with its
                        last slope. Any other window w: full up to w, then seconds(w) (1 + 2 (n - w) / w), as w more
                        tokens have twice the pairs of the first w.
    experts             decode moves the experts that at least one token is routed to. Between two measured numbers of
                        experts: linear in touched experts, E (1 - (1 - k / E)^n). Below the smallest, E0: the time in
                        which E0 experts serve as many tokens n0 as touch equally many experts, plus the arithmetic of
                        the other n - n0 tokens at the rate of the longest measured batches; never more than E0 experts
                        take for the same n tokens.
    products            beyond the widest measured matrix (the head): linear in its width. Narrower than the narrowest:
                        as long as the narrowest, a tile is never smaller.

Legend: n tokens, E experts of a layer, k experts per token.
Source: the laws are arithmetic and traffic counts; the tables are those of aiconfigurator-core 0.12.0.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field

from lit_puzzle.costs.accounting import distinct_experts
from lit_puzzle.costs.kernel_tables import Curve, System, mix, neighbors, read_rows
from lit_puzzle.costs.serving import Deployment, ModelShape

LONGEST_CONTEXT = 131072  # the longest that was measured for any number of heads
KV_DTYPES = {"bfloat16": "bfloat16", "fp8": "fp8"}
WEIGHT_DTYPES = {"bfloat16": "bfloat16", "fp8": "fp8"}
EXPERT_DTYPES = {"mxfp4": "w4a16_mxfp4", "bfloat16": "bfloat16", "fp8": "fp8"}


def measured_dtype(known: dict[str, str], what: str, dtype: str) -> str:
    """The tables' name of a number format.

    Raises:
        ValueError: When no kernel was measured with it.
    """
    if dtype not in known:
        raise ValueError(f"no measured kernels with {what} {dtype!r}; allowed: {sorted(known)}")
    return known[dtype]


@dataclass(frozen=True)
class DecodeAttention:
    """Seconds of one step's attention by window (0 is full), sequences and context."""

    windows: dict[int, dict[int, Curve]]
    sizes: dict[int, list[int]]

    @classmethod
    def load(cls, system: System, model: ModelShape, ranks: int, kv_dtype: str) -> DecodeAttention:
        """The rows of this model's heads on one of `ranks` GPUs."""
        windows: dict[int, dict[int, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
        path = f"{system.folder}/attention/vllm/{system.vllm}/generation_attention_perf.parquet"
        rows = read_rows(path, ("window_size", "batch_size", "step"), _heads(model, ranks, kv_dtype))
        for window, batch, step, latency in rows:
            windows[window][batch][step + 1] = latency  # the new token attends to itself too
        if 0 not in windows:
            raise ValueError(f"{path} has no full attention for {_heads(model, ranks, kv_dtype)}; nothing to go by")
        curves = {
            window: {batch: Curve.of(path, "context", points) for batch, points in sorted(batches.items())}
            for window, batches in windows.items()
        }
        return cls(curves, {window: list(batches) for window, batches in curves.items()})

    def at(self, window_tokens: int | None, batch_size: int, context_tokens: float) -> float:
        """Seconds for `batch_size` sequences that each attend to `context_tokens`, or to the window's."""
        if not context_tokens <= LONGEST_CONTEXT + 1:
            raise ValueError(f"a context of {context_tokens:g} tokens; attention was measured up to {LONGEST_CONTEXT}")
        window = window_tokens or 0
        if window and window not in self.windows:
            context_tokens, window = min(context_tokens, float(window)), 0
        batches = self.windows[window]
        if batch_size in batches:
            return _go_on(batches[batch_size], context_tokens, window)
        sizes = self.sizes[window]
        if not sizes[0] <= batch_size <= sizes[-1]:
            raise ValueError(f"{batches[sizes[0]].table}: {batch_size} sequences; measured {sizes[0]}..{sizes[-1]}")
        right = bisect_left(sizes, batch_size)
        low, high = sizes[right - 1], sizes[right]
        below, above = (_go_on(batches[size], context_tokens, window) for size in (low, high))
        return below + (batch_size - low) / (high - low) * (above - below)


def _go_on(curve: Curve, context_tokens: float, window: int) -> float:
    """Attention of one measured batch at any context: linear beyond its longest, constant beyond a window."""
    last = curve.sizes[-1]
    if context_tokens <= last:
        return curve.at(max(context_tokens, curve.sizes[0]))  # 1 token costs what the 2 of the first row do
    if window:
        return curve.seconds[-1] if last >= window else curve.at(context_tokens)
    return curve.seconds[-1] + curve.last_slope() * (context_tokens - last)


@dataclass(frozen=True)
class PrefillAttention:
    """Seconds of reading one prompt by window (0 is full) and length."""

    windows: dict[int, Curve]

    @classmethod
    def load(cls, system: System, model: ModelShape, ranks: int, kv_dtype: str) -> PrefillAttention:
        """The rows of this model's heads on one of `ranks` GPUs, one prompt at a time."""
        path = f"{system.folder}/attention/vllm/{system.vllm}/context_attention_perf.parquet"
        filters = (*_heads(model, ranks, kv_dtype), ("batch_size", "=", 1))
        windows: dict[int, dict[float, float]] = defaultdict(dict)
        for window, tokens, latency in read_rows(path, ("window_size", "isl"), filters):
            windows[window][tokens] = latency
        if 0 not in windows:
            raise ValueError(f"{path} has no full attention for {filters}; nothing to go by")
        return cls({window: Curve.of(path, "prompt", points) for window, points in windows.items()})

    def at(self, window_tokens: int | None, prompt_tokens: float) -> float:
        """Seconds of all chunks of one prompt together."""
        full, window = self.windows[0], window_tokens or 0
        if window in self.windows and window:
            curve = self.windows[window]
            last = curve.sizes[-1]
            return curve.at(min(prompt_tokens, last)) + curve.last_slope() * max(0.0, prompt_tokens - last)
        if window and prompt_tokens > window:
            return self.at(None, window) * (1 + 2 * (prompt_tokens - window) / window)
        last = full.sizes[-1]
        return full.at(prompt_tokens) if prompt_tokens <= last else full.seconds[-1] * (prompt_tokens / last) ** 2


def _heads(model: ModelShape, ranks: int, kv_dtype: str) -> tuple[tuple[str, str, object], ...]:
    """Filter for one rank's share of the heads; key-value heads are copied where ranks outnumber them."""
    return (
        ("head_dim", "=", model.head_dim),
        ("num_heads", "=", model.num_query_heads // ranks),
        ("num_key_value_heads", "=", -(-model.num_kv_heads // ranks)),
        ("kv_cache_dtype", "=", measured_dtype(KV_DTYPES, "kv_dtype", kv_dtype)),
    )


@dataclass(frozen=True)
class Experts:
    """Seconds of router choice and experts by number of experts and tokens, on one rank."""

    experts_per_token: int
    counts: dict[int, Curve]

    @classmethod
    def load(
        cls, system: System, model: ModelShape, deployment: Deployment, expert_dtype: str, distribution: str
    ) -> Experts:
        """The rows of this model's experts, shared as the deployment says, under one distribution of the routing."""
        path = f"{system.folder}/moe/vllm/{system.vllm}/moe_perf.parquet"
        groups = deployment.expert_parallel
        filters = (
            ("hidden_size", "=", model.hidden),
            ("inter_size", "=", model.intermediate),
            ("topk", "=", model.experts_per_token),
            ("moe_tp_size", "=", deployment.tensor_parallel // groups),
            ("moe_ep_size", "=", groups),
            ("moe_dtype", "=", measured_dtype(EXPERT_DTYPES, "expert_dtype", expert_dtype)),
            ("distribution", "=", distribution),
        )
        counts: dict[int, dict[float, float]] = defaultdict(dict)
        for experts, tokens, latency in read_rows(path, ("num_experts", "num_tokens"), filters):
            counts[experts][tokens] = latency
        if not counts:
            raise ValueError(f"{path} has no rows with {' and '.join(f'{a} {b}' for a, _, b in filters)}")
        curves = {experts: Curve.of(path, "tokens", points) for experts, points in sorted(counts.items())}
        return cls(model.experts_per_token, curves)

    def at(self, num_experts: int, tokens: float) -> float:
        """Seconds for `tokens` through a layer of `num_experts`."""
        measured = list(self.counts)
        if num_experts > measured[-1]:
            table = self.counts[measured[-1]].table
            raise ValueError(f"{table}: {num_experts} experts; measured {measured}, and fewer follow from them")
        if num_experts in self.counts:
            return self.counts[num_experts].at(tokens)
        if num_experts < measured[0]:
            return self._fewer(num_experts, measured[0], tokens)
        (low, _), (high, _) = neighbors(measured, num_experts)
        # At a single token all layers touch equally many experts: the limit of the ratio is taken just above.
        touched = [
            distinct_experts(count, self.experts_per_token, max(tokens, 1.01)) for count in (low, num_experts, high)
        ]
        share = (touched[1] - touched[0]) / (touched[2] - touched[0])
        return (1 - share) * self.counts[int(low)].at(tokens) + share * self.counts[int(high)].at(tokens)

    def _fewer(self, num_experts: int, smallest: int, tokens: float) -> float:
        curve, per_token = self.counts[smallest], self.experts_per_token
        touched = distinct_experts(num_experts, per_token, tokens)
        alike = max(1.0, math.log1p(-touched / smallest) / math.log1p(-per_token / smallest))
        return min(curve.at(tokens), curve.at(alike) + curve.last_slope() * (tokens - alike))


@dataclass(frozen=True)
class Products:
    """Seconds of products of a matrix [columns out, columns in] with any number of tokens."""

    table: str
    measured: dict[tuple[int, int], Curve]
    curves: dict[tuple[int, int], Curve] = field(default_factory=dict)

    def at(self, out: float, inside: float, tokens: float) -> float:
        """Seconds of `tokens` rows times a matrix [out, inside]."""
        key = (math.ceil(out), math.ceil(inside))
        if key not in self.curves:
            self.curves[key] = self._curve(*key)
        return self.curves[key].at(tokens)

    def _curve(self, out: int, inside: int) -> Curve:
        outs, insides = (sorted({shape[axis] for shape in self.measured}) for axis in (0, 1))
        if not insides[0] <= inside <= insides[-1]:
            raise ValueError(f"{self.table}: {inside} columns; measured {insides[0]}..{insides[-1]}")
        clamped = min(max(out, outs[0]), outs[-1])
        parts = []
        for wide, wide_weight in neighbors(outs, clamped):
            for deep, deep_weight in neighbors(insides, inside):
                if (int(wide), int(deep)) not in self.measured:
                    raise ValueError(f"{self.table}: a matrix of {wide:g} x {deep:g} was not measured")
                weight = wide_weight * deep_weight * max(1.0, out / outs[-1])
                parts.append((weight, self.measured[int(wide), int(deep)]))
        return mix(parts)


@functools.cache
def load_products(system: System, weight_dtype: str) -> Products:
    """All measured matrices of one number format; read once, as every model and every sharing needs them.

    Raises:
        ValueError: When none was measured.
    """
    path = f"{system.folder}/gemm/vllm/{system.vllm}/gemm_perf.parquet"
    dtype = measured_dtype(WEIGHT_DTYPES, "weight_dtype", weight_dtype)
    points: dict[tuple[int, int], dict[float, float]] = defaultdict(dict)
    for out, inside, tokens, latency in read_rows(path, ("n", "k", "m"), (("gemm_dtype", "=", dtype),)):
        points[out, inside][tokens] = latency
    if not points:
        raise ValueError(f"{path} has no products with weights in {dtype}; choose bfloat16")
    return Products(path, {shape: Curve.of(path, "tokens", curve) for shape, curve in points.items()})
