"""The time of each kernel: its measured table, and the scaling law that extrapolates it beyond the measured sizes.

Reads through `lit_puzzle.costs.kernel_tables`. Where no law is stated, a size outside the measured range is a
ValueError.

    decode attention    is bound by reading the cache, so its time is linear in cached tokens. Beyond the longest
                        measured context, up to 131072 tokens: seconds per sequence and token, the median over the
                        measured batches of the slope of their last two contexts (one batch alone scatters by 10%). A
                        window that was not measured: full attention at min(context, window).
    prefill attention   is bound by arithmetic, counted in pairs of query and key. The chunks of a prompt add up to the
                        prompt read at once. Full attention beyond the longest measured prompt: a n + b n^2 through the
                        last two measured prompts.
                        A measured window: its last slope. Any other window w: full attention up to w, then
                        seconds(w) (1 + 2 (n - w) / w), as w more tokens have twice the pairs of the first w.
    experts             decode is bound by reading the distinct experts that its tokens are routed to. Between two
                        measured expert counts: linear in distinct experts, E (1 - (1 - k / E)^n). Below the smallest
                        count, E0: the time of E0 experts for the number of tokens n0 that has equally many distinct
                        experts, plus the arithmetic of the other n - n0 tokens at the slope of the two longest measured
                        batches; at most the time of E0 experts for the same n tokens.
    products            a matrix wider than the widest measured one (the head): linear in its width. Narrower than the
                        narrowest: the time of the narrowest, because a tile is never smaller.

Legend: n tokens, E experts of a layer, k experts per token.
Source: the laws count arithmetic and memory traffic; the tables are those of aiconfigurator-core 0.12.0.
"""

from __future__ import annotations

import functools
import math
import statistics
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field

from lit_puzzle.costs.accounting import distinct_experts
from lit_puzzle.costs.kernel_tables import Curve, System, mix, neighbors, read_rows
from lit_puzzle.costs.model_shape import ModelShape
from lit_puzzle.costs.serving import Deployment

LONGEST_CONTEXT = 131072  # the longest that was measured for any number of heads
KV_DTYPES = {"bfloat16": "bfloat16", "fp8": "fp8"}
WEIGHT_DTYPES = {"bfloat16": "bfloat16", "fp8": "fp8"}
EXPERT_DTYPES = {"mxfp4": "w4a16_mxfp4", "bfloat16": "bfloat16", "fp8": "fp8"}
MXFP8_INPUTS = "w4a8_mxfp4_mxfp8"


def measured_dtype(known: dict[str, str], what: str, dtype: str) -> str:
    """Return the tables' name of a number format.

    Args:
        known: number formats that were measured, and the tables' names for them.
        what: key of the scenario, for the error message.
        dtype: the number format.

    Raises:
        ValueError: no kernel was measured with it.
    """
    if dtype not in known:
        raise ValueError(f"no measured kernels with {what} {dtype!r}; allowed: {sorted(known)}")
    return known[dtype]


@dataclass(frozen=True)
class DecodeAttention:
    """Seconds of the attention of one decode step by window (0 is full attention), sequences and context.

    Attributes:
        windows: for each window and number of sequences, seconds by context.
        sizes: for each window, the measured numbers of sequences, ascending.
        slope: seconds per sequence and token of its context, beyond the measured contexts of full attention.
    """

    windows: dict[int, dict[int, Curve]]
    sizes: dict[int, list[int]]
    slope: float

    @classmethod
    def load(cls, system: System, model: ModelShape, ranks: int, kv_dtype: str) -> DecodeAttention:
        """Read the rows of this model's heads on one of `ranks` GPUs."""
        windows: dict[int, dict[int, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
        path = f"{system.folder}/attention/vllm/{system.vllm}/generation_attention_perf.parquet"
        rows = read_rows(path, ("window_size", "batch_size", "step"), _heads(model, ranks, kv_dtype))
        for window, batch, step, latency in rows:
            windows[window][batch][step + 1] = latency  # the new token attends to itself too
        if 0 not in windows:
            raise ValueError(f"{path} has no full attention for {_heads(model, ranks, kv_dtype)}; use the roofline")
        curves = {
            window: {batch: Curve.of(path, "context", points) for batch, points in sorted(batches.items())}
            for window, batches in windows.items()
        }
        slope = statistics.median(curve.last_slope() / batch for batch, curve in curves[0].items())
        return cls(curves, {window: list(batches) for window, batches in curves.items()}, slope)

    def at(self, window_tokens: int | None, batch_size: int, context_tokens: float) -> float:
        """Return the seconds for `batch_size` sequences that attend to `context_tokens` each, or to their window.

        Raises:
            ValueError: the context is longer, or the batch larger, than any that was measured.
        """
        if not context_tokens <= LONGEST_CONTEXT + 1:
            raise ValueError(f"a context of {context_tokens:g} tokens; attention was measured up to {LONGEST_CONTEXT}")
        window = window_tokens or 0
        if window and window not in self.windows:
            context_tokens, window = min(context_tokens, float(window)), 0
        batches = self.windows[window]
        if batch_size in batches:
            return self._one(window, batch_size, context_tokens)
        sizes = self.sizes[window]
        if not sizes[0] <= batch_size <= sizes[-1]:
            raise ValueError(f"{batches[sizes[0]].table}: {batch_size} sequences; measured {sizes[0]}..{sizes[-1]}")
        right = bisect_left(sizes, batch_size)
        low, high = sizes[right - 1], sizes[right]
        below, above = (self._one(window, size, context_tokens) for size in (low, high))
        return below + (batch_size - low) / (high - low) * (above - below)

    def _one(self, window: int, batch: int, context_tokens: float) -> float:
        return _extrapolate(self.windows[window][batch], context_tokens, window, batch * self.slope)


def _extrapolate(curve: Curve, context_tokens: float, window: int, slope: float) -> float:
    """Return the seconds of one measured batch at any context: linear beyond its longest, constant beyond a window."""
    last = curve.sizes[-1]
    if context_tokens <= last:
        return curve.at(max(context_tokens, curve.sizes[0]))  # 1 token costs what the 2 of the first row do
    if window:
        return curve.seconds[-1] if last >= window else curve.at(context_tokens)
    return curve.seconds[-1] + slope * (context_tokens - last)


@dataclass(frozen=True)
class PrefillAttention:
    """Seconds of the attention of one prompt by window (0 is full attention) and length."""

    windows: dict[int, Curve]

    @classmethod
    def load(cls, system: System, model: ModelShape, ranks: int, kv_dtype: str) -> PrefillAttention:
        """Read the rows of this model's heads on one of `ranks` GPUs, one prompt at a time."""
        path = f"{system.folder}/attention/vllm/{system.vllm}/context_attention_perf.parquet"
        filters = (*_heads(model, ranks, kv_dtype), ("batch_size", "=", 1))
        windows: dict[int, dict[float, float]] = defaultdict(dict)
        for window, tokens, latency in read_rows(path, ("window_size", "isl"), filters):
            windows[window][tokens] = latency
        if 0 not in windows:
            raise ValueError(f"{path} has no full attention for {filters}; use the roofline")
        return cls({window: Curve.of(path, "prompt", points) for window, points in windows.items()})

    def at(self, window_tokens: int | None, prompt_tokens: float) -> float:
        """Return the seconds of all chunks of one prompt together."""
        full, window = self.windows[0], window_tokens or 0
        if window in self.windows and window:
            curve = self.windows[window]
            last = curve.sizes[-1]
            return curve.at(min(prompt_tokens, last)) + curve.last_slope() * max(0.0, prompt_tokens - last)
        if window and prompt_tokens > window:
            return self.at(None, window) * (1 + 2 * (prompt_tokens - window) / window)
        return full.at(prompt_tokens) if prompt_tokens <= full.sizes[-1] else quadratic(full, prompt_tokens)


def quadratic(curve: Curve, size: float) -> float:
    """Return a n + b n^2 at a size n, through the last two points of a curve."""
    (first, last), (before, after) = curve.sizes[-2:], curve.seconds[-2:]
    square = (after / last - before / first) / (last - first)
    return size * (after / last + square * (size - last))


def _heads(model: ModelShape, ranks: int, kv_dtype: str) -> tuple[tuple[str, str, object], ...]:
    """Return the filter for one rank's heads; key-value heads are replicated where ranks outnumber them."""
    return (
        ("head_dim", "=", model.head_dim),
        ("num_heads", "=", model.num_query_heads // ranks),
        ("num_key_value_heads", "=", -(-model.num_kv_heads // ranks)),
        ("kv_cache_dtype", "=", measured_dtype(KV_DTYPES, "kv_dtype", kv_dtype)),
    )


@dataclass(frozen=True)
class Experts:
    """Seconds of top-k routing and experts on one rank, by number of experts and tokens."""

    experts_per_token: int
    counts: dict[int, Curve]

    @classmethod
    def load(
        cls, system: System, model: ModelShape, deployment: Deployment, dtypes: tuple[str, str], distribution: str
    ) -> Experts:
        """Read the rows of this model's experts, split as the deployment says, for one distribution of the routing.

        Args:
            system: where the tables are.
            model: sizes of the model.
            deployment: how the GPUs share it.
            dtypes: number formats of the experts and of their inputs.
            distribution: how tokens are spread over experts.
        """
        (expert_dtype, inputs), groups = dtypes, deployment.expert_parallel
        path, kernel = (
            f"{system.folder}/moe/vllm/{system.vllm}",
            measured_dtype(EXPERT_DTYPES, "expert_dtype", expert_dtype),
        )
        if inputs == "mxfp8":
            if system.mxfp8_experts is None or expert_dtype != "mxfp4":
                raise ValueError(
                    f"no measured kernels of {expert_dtype} experts with expert_inputs: mxfp8 in {system.folder}; it "
                    "needs MXFP4 experts on a B200. Set expert_inputs: bfloat16"
                )
            path, kernel = f"{system.folder}/moe/{system.mxfp8_experts}", MXFP8_INPUTS
        path += "/moe_perf.parquet"
        filters = (
            ("hidden_size", "=", model.hidden),
            ("inter_size", "=", model.intermediate),
            ("topk", "=", model.experts_per_token),
            ("moe_tp_size", "=", deployment.tensor_parallel // groups),
            ("moe_ep_size", "=", groups),
            ("moe_dtype", "=", kernel),
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
        """Return the seconds of `tokens` tokens through a layer of `num_experts`.

        Raises:
            ValueError: there are more experts, or more tokens, than were measured.
        """
        measured = list(self.counts)
        if num_experts > measured[-1]:
            table = self.counts[measured[-1]].table
            raise ValueError(f"{table}: {num_experts} experts; measured are {measured}, fewer are extrapolated")
        if num_experts in self.counts:
            return self.counts[num_experts].at(tokens)
        if num_experts < measured[0]:
            return self._fewer(num_experts, measured[0], tokens)
        (low, _), (high, _) = neighbors(measured, num_experts)
        # A single token has k distinct experts whatever the count: the limit of the ratio is taken just above 1 token.
        distinct = [
            distinct_experts(count, self.experts_per_token, max(tokens, 1.01)) for count in (low, num_experts, high)
        ]
        share = (distinct[1] - distinct[0]) / (distinct[2] - distinct[0])
        return (1 - share) * self.counts[int(low)].at(tokens) + share * self.counts[int(high)].at(tokens)

    def _fewer(self, num_experts: int, smallest: int, tokens: float) -> float:
        curve, per_token = self.counts[smallest], self.experts_per_token
        distinct = distinct_experts(num_experts, per_token, tokens)
        equivalent = max(1.0, math.log1p(-distinct / smallest) / math.log1p(-per_token / smallest))
        return min(curve.at(tokens), curve.at(equivalent) + curve.last_slope() * (tokens - equivalent))


@dataclass(frozen=True)
class Products:
    """Seconds of the product of a matrix [out, in] with any number of tokens.

    Attributes:
        table: the table that the points are from, for error messages.
        measured: seconds by tokens for every measured matrix.
        curves: the same for every matrix asked for so far.
    """

    table: str
    measured: dict[tuple[int, int], Curve]
    curves: dict[tuple[int, int], Curve] = field(default_factory=dict)

    def at(self, out: float, inside: float, tokens: float) -> float:
        """Return the seconds of `tokens` rows times a matrix [out, inside].

        Raises:
            ValueError: the matrix is deeper, or the rows are more, than any that was measured.
        """
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
    """Read all measured matrices of one number format, once per process.

    Raises:
        ValueError: none was measured.
    """
    path = f"{system.folder}/gemm/vllm/{system.vllm}/gemm_perf.parquet"
    dtype = measured_dtype(WEIGHT_DTYPES, "weight_dtype", weight_dtype)
    points: dict[tuple[int, int], dict[float, float]] = defaultdict(dict)
    for out, inside, tokens, latency in read_rows(path, ("n", "k", "m"), (("gemm_dtype", "=", dtype),)):
        points[out, inside][tokens] = latency
    if not points:
        raise ValueError(f"{path} has no products with weights in {dtype}; choose bfloat16")
    return Products(path, {shape: Curve.of(path, "tokens", curve) for shape, curve in points.items()})
