"""The time of attention: measured tables, and the scaling laws that extrapolate beyond the measured sizes.

Reads through `lit_puzzle.costs.kernel_tables`. Where no law is stated, a size outside the measured range is a
ValueError.

    decode attention    is bound by reading the cache, so its time is linear in cached tokens. Beyond the longest
                        measured context, up to 131072 tokens: seconds per sequence and token, the median over the
                        measured batches of the slope of their last two contexts (one batch alone scatters by 10%). A
                        window w that was not measured with these heads: full attention up to w tokens; beyond, that of
                        w tokens x `beyond`, by how much the kernel with the nearest window takes longer at twice its
                        window than full attention at its window, for as many sequences x key-value heads, in heads of
                        other sizes (8192: 1.2 to 1.6 on H100 with an fp8 cache, 1.0 to 1.3 otherwise).
    prefill attention   is bound by arithmetic, counted in pairs of query and key. The chunks of a prompt add up to the
                        prompt read at once. Full attention beyond the longest measured prompt: a n + b n^2 through the
                        last two measured prompts.
                        A measured window: its last slope. Any other window w: full attention up to w, then
                        seconds(w) (1 + 2 (n - w) / w), as w more tokens have twice the pairs of the first w.

Legend: n tokens.
Source: the laws count arithmetic and memory traffic; the tables are those of aiconfigurator-core 0.12.0.
"""

from __future__ import annotations

import functools
import math
import statistics
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass

from lit_puzzle.costs.kernel_tables import Curve, System, measured_dtype, read_rows
from lit_puzzle.costs.model_shape import ModelShape

LONGEST_CONTEXT = 131072  # the longest that was measured for any number of heads
WIDE_WINDOW = 1024  # narrower ones lie across two tiles of a kernel where full attention reads one
KV_DTYPES = {"bfloat16": "bfloat16", "fp8": "fp8"}


@dataclass(frozen=True)
class DecodeAttention:
    """Seconds of the attention of one decode step by window (0 is full attention), sequences and context.

    Attributes:
        windows: for each window and number of sequences, seconds by context.
        sizes: for each window, the measured numbers of sequences, ascending.
        slope: seconds per sequence and token of its context, beyond the measured contexts of full attention.
        kv_heads: key-value heads of a rank.
        beyond: for windows measured with heads of other sizes, seconds beyond the window over those of full attention,
            by sequences x key-value heads.
    """

    windows: dict[int, dict[int, Curve]]
    sizes: dict[int, list[int]]
    slope: float
    kv_heads: int
    beyond: dict[int, Curve]

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
        kv_heads, beyond = -(-model.num_kv_heads // ranks), _beyond(path, model.head_dim, kv_dtype)
        return cls(curves, {window: list(batches) for window, batches in curves.items()}, slope, kv_heads, beyond)

    def at(self, window_tokens: int | None, batch_size: int, context_tokens: float) -> float:
        """Return the seconds for `batch_size` sequences that attend to `context_tokens` each, or to their window.

        Raises:
            ValueError: the context is longer, or the batch larger, than any that was measured.
        """
        if not context_tokens <= LONGEST_CONTEXT + 1:
            raise ValueError(f"a context of {context_tokens:g} tokens; attention was measured up to {LONGEST_CONTEXT}")
        window = window_tokens or 0
        if window and window not in self.windows:
            return self._in_window(window, batch_size, context_tokens)
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

    def _in_window(self, window: int, batch_size: int, context_tokens: float) -> float:
        full = self.at(None, batch_size, min(context_tokens, float(window)))
        if context_tokens <= window or not self.beyond:
            return full
        ratios = self.beyond[min(self.beyond, key=lambda measured: abs(math.log(measured / window)))]
        return full * ratios.at(min(max(batch_size * self.kv_heads, ratios.sizes[0]), ratios.sizes[-1]))

    def _one(self, window: int, batch: int, context_tokens: float) -> float:
        return _extrapolate(self.windows[window][batch], context_tokens, window, batch * self.slope)


@functools.cache
def _beyond(path: str, head_dim: int, kv_dtype: str) -> dict[int, Curve]:
    """Read how much longer a window's kernel takes at twice its window than full attention at its window.

    Returns:
        For each wide window that was measured with heads of other sizes than `head_dim`: the median ratio by sequences
        x key-value heads.
    """
    filters = (("kv_cache_dtype", "=", measured_dtype(KV_DTYPES, "kv_dtype", kv_dtype)), ("head_dim", "!=", head_dim))
    columns = ("window_size", "step", "head_dim", "num_heads", "num_key_value_heads", "batch_size")
    rows = {row[:-1]: row[-1] for row in read_rows(path, columns, filters)}
    ratios: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (window, step, *heads, batch), latency in rows.items():
        full = rows.get((0, window - 1, *heads, batch))
        if window >= WIDE_WINDOW and step + 1 == 2 * window and full:
            ratios[window][batch * heads[-1]].append(latency / full)
    return {
        window: Curve(
            path, "sequences x key-value heads", tuple(sorted(by)), tuple(statistics.median(by[n]) for n in sorted(by))
        )
        for window, by in ratios.items()
    }


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
