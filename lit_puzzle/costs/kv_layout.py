"""The KV cache as the serving engine allocates it: vLLM's groups of layers, its blocks and its padding, or ideal bytes.

Reads and writes nothing. vLLM keeps one pool of equal blocks. Layers of one attention type (full, or one window) form
groups; a block holds `block_tokens` tokens of every layer of one group, and a request has a block table of its own for
each group. All groups are padded to one width:

    n_t      layers of type t;  least, most = min, max over t of n_t
    width    most if most < 1.5 least, else least                                        (layers per group)
    groups   ceil(n_t / width) of each type
    page     block_tokens x 2 x ceil(key-value heads / ranks) x head_dim x bytes of a value   (bytes of layer and block)
    block    width x page bytes, whatever its group holds

A request whose cache holds n tokens has, in each group of its type,

    full attention     ceil(n / block_tokens) blocks
    window of w        ceil(n / block_tokens) - floor(max(0, n - w) / block_tokens)

The window groups also hold the chunk of a prompt that is being read; one block is never given out. `mean_blocks` is
the mean over a request's decode steps, by which a search counts (or their last, `in_step`); `most_blocks` is what vLLM
itself reserves, by which it states its maximum concurrency.

So 10 full / 8 x 8192 / 18 x 128 layers take almost what 18 full / 18 x 128 take: with width 8 the 10 full layers fill
2 groups of 8. `vllm_weighted` is the branch of vLLM that the model card of gpt-oss-puzzle-88B installs: its width is
the one with the fewest bytes of padding, layers weighted by what vLLM reserves for them (`weighted_width`); 10 there.
`ideal` counts the bytes of every layer alone, for engines that waste nothing.

Source: vLLM 0.32.0, `vllm/v1/core/kv_cache_utils.py` (`_get_kv_cache_groups_uniform_page_size`,
`get_kv_cache_config_from_groups`, `get_max_concurrency_for_kv_cache_config`), `vllm/v1/kv_cache_interface.py` and
`single_type_kv_cache_manager.py`; for layers of one head shape these are the same in 0.31.0 (wheel) and 0.33.0 (source
distribution, where they are in `kv_cache_planning.py`). Checked by `scripts/bench/kv_layout.py`. `weighted_width`:
`_find_best_group_size` of commit 88f6aaad7cc2fe8904d5fcf31d06eb57f15a6d25 of vllm-project/vllm (pull request 38135).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Allocator = Literal["vllm", "vllm_weighted", "ideal"]
Requests = Literal["staggered", "in_step"]
WindowCounts = tuple[tuple[int | None, int], ...]  # window (None: full attention) and number of its layers

VERSIONS = ("0.31", "0.32", "0.33")  # whose allocation is modeled
PREFERRED_WIDTH, MOST_PADDING = 3, 0.10  # of the weighted width: narrower only where this share of bytes is saved
SIMILAR = 1.5  # vLLM: with fewer than this many times the least layers, the most layers are the width
BLOCK_MULTIPLE = 16  # vLLM's attention kernels take blocks of a multiple of 16 tokens


@dataclass(frozen=True)
class KVAllocation:
    """How the engine allocates its KV cache.

    Args:
        allocator: `vllm` pads groups of layers as vLLM does, `vllm_weighted` as the branch for gpt-oss-puzzle-88B;
            `ideal` counts the bytes of every layer alone.
        version: version of vLLM, `0.31` to `0.33` (a patch release `0.32.1` counts as `0.32`).
        block_tokens: tokens of a block (`--block-size`); None: the device's default in gpus.json.
        concurrent_batches: batches that are scheduled at a time: 2 with asynchronous scheduling, vLLM's default on
            GPUs, else 1. Windows keep the tokens of these batches.
        context_tokens: `max_model_len`, by which `vllm_weighted` weighs; None: the tokens of the scenario's requests.
        requests: `staggered` requests start at different times, so that the cache holds their mean lengths; those of a
            benchmark that starts all at once are `in_step`: all have their longest context at one time, and must fit.

    Raises:
        ValueError: an unknown allocator or version, or a count that vLLM refuses.
    """

    allocator: Allocator = "vllm"
    version: str = "0.32"
    block_tokens: int | None = None
    concurrent_batches: int = 2
    context_tokens: int | None = None
    requests: Requests = "staggered"

    def __post_init__(self) -> None:
        if self.allocator not in get_args(Allocator):
            raise ValueError(
                f"KVAllocation: unknown allocator {self.allocator!r}; allowed: {list(get_args(Allocator))}"
            )
        if self.requests not in get_args(Requests):
            raise ValueError(f"KVAllocation: requests must be one of {list(get_args(Requests))}, got {self.requests!r}")
        if ".".join(str(self.version).split(".")[:2]) not in VERSIONS:
            raise ValueError(
                f"KVAllocation: the KV cache of vLLM {self.version!r} is not modeled; allowed: {list(VERSIONS)}. Take "
                "the nearest, or allocator: ideal for another engine"
            )
        if self.concurrent_batches not in (1, 2):
            raise ValueError(f"KVAllocation: concurrent_batches must be 1 or 2, got {self.concurrent_batches!r}")
        context = self.context_tokens
        if context is not None and (not isinstance(context, int) or isinstance(context, bool) or context < 1):
            raise ValueError(f"KVAllocation: context_tokens must be a whole number of at least 1, got {context!r}")
        block = self.block_tokens
        if block is not None and (isinstance(block, bool) or block < 1 or block % BLOCK_MULTIPLE):
            raise ValueError(f"KVAllocation: block_tokens must be a multiple of {BLOCK_MULTIPLE}, got {block!r}")


@dataclass(frozen=True)
class KVDemand:
    """Bytes of KV cache on each GPU: `fixed_bytes` + requests in flight x `request_bytes`."""

    request_bytes: float
    fixed_bytes: float

    def total(self, requests: int) -> float:
        """Return the bytes for that many requests in flight."""
        return self.fixed_bytes + requests * self.request_bytes

    def requests(self, free_bytes: float) -> int:
        """Return how many requests fit; 0 when none does."""
        free = free_bytes - self.fixed_bytes
        return 0 if free < self.request_bytes else int(free / self.request_bytes)


def window_counts(windows: Iterable[int | None]) -> WindowCounts:
    """Count the layers of each attention type; full attention first, then wide windows before narrow ones."""
    counted = Counter(windows)
    return tuple(sorted(counted.items(), key=lambda pair: (pair[0] is not None, -(pair[0] or 0))))


def group_width(counts: WindowCounts) -> int:
    """Return how many layers vLLM puts into a group."""
    layers = [count for _, count in counts]
    least, most = min(layers), max(layers)
    return most if most < SIMILAR * least else least


def weighted_width(counts: WindowCounts, tokens: int, block_tokens: int, in_flight_tokens: int) -> int:
    """Return how many layers the branch for gpt-oss-puzzle-88B puts into a group: the widest of least padding.

    With at most 3 layers of every type it is the most layers, whatever that pads.

    Padding is (-n_t mod width) layers of each type, by the blocks that vLLM reserves for one of them. A width below 3
    is taken only where 3 and more pad over a tenth of all bytes more.

    Args:
        counts: layers of each attention type.
        tokens: `max_model_len`.
        block_tokens: tokens of a block.
        in_flight_tokens: `max_num_batched_tokens` x concurrent batches.
    """
    reserved = [(most_blocks(tokens, window, block_tokens, in_flight_tokens), count) for window, count in counts]
    most = max(count for _, count in reserved)
    if most <= PREFERRED_WIDTH:
        return most

    def padding(width: int) -> int:
        return sum(-count % width * blocks for blocks, count in reserved)

    def widest_of_least(fewest: int) -> int:
        return min(range(most, fewest - 1, -1), key=padding)

    any_width, preferred = widest_of_least(1), widest_of_least(PREFERRED_WIDTH)
    saved = padding(preferred) - padding(any_width)
    return any_width if saved > MOST_PADDING * sum(blocks * count for blocks, count in reserved) else preferred


def groups_of(counts: WindowCounts, width: int | None = None) -> list[tuple[int | None, int]]:
    """Return the window of each attention type and how many groups of `width` layers it fills; None: `group_width`."""
    width = width or group_width(counts)
    return [(window, -(-count // width)) for window, count in counts]


def padding_share(counts: WindowCounts) -> float:
    """Return the share of the places for layers, in all groups, that no layer fills."""
    places = group_width(counts) * sum(groups for _, groups in groups_of(counts))
    return 1 - sum(count for _, count in counts) / places


def mean_blocks(prompt_tokens: int, generated_tokens: int, window: int | None, block_tokens: int) -> float:
    """Return the blocks of a request in one group, mean over its decode steps, with P+1 .. P+G tokens cached."""
    first, last = prompt_tokens, prompt_tokens + generated_tokens
    held = _ceilings(last, block_tokens) - _ceilings(first, block_tokens)
    if window is not None:
        held -= _floors(max(0, last - window), block_tokens) - _floors(max(0, first - window), block_tokens)
    return held / generated_tokens


def _ceilings(most: int, block: int) -> int:
    """Return the sum of ceil(n / block) over n = 1..most."""
    whole, rest = divmod(most, block)
    return block * whole * (whole + 1) // 2 + rest * (whole + 1)


def _floors(most: int, block: int) -> int:
    """Return the sum of floor(n / block) over n = 1..most."""
    whole, rest = divmod(most, block)
    return block * whole * (whole - 1) // 2 + whole * (rest + 1)


def most_blocks(tokens: int, window: int | None, block_tokens: int, in_flight_tokens: int) -> int:
    """Return the blocks that vLLM reserves in one group for a request of at most `tokens` tokens.

    Args:
        tokens: `max_model_len`.
        window: window of the group; None is full attention.
        block_tokens: tokens of a block.
        in_flight_tokens: `max_num_batched_tokens` x concurrent batches.
    """
    if window is None:
        return -(-tokens // block_tokens)
    return -(-min(window - 1 + in_flight_tokens, tokens) // block_tokens) + 1


@dataclass(frozen=True)
class Capacity:
    """What vLLM states when it starts.

    Attributes:
        blocks: blocks of the pool (`num_gpu_blocks`).
        requests: maximum concurrency at `max_model_len` tokens per request.
    """

    blocks: int
    requests: float


def vllm_capacity(
    counts: WindowCounts,
    available_bytes: int,
    tokens: int,
    token_bytes: int,
    block_tokens: int,
    in_flight_tokens: int,
    width: int | None = None,
) -> Capacity:
    """Return the pool that vLLM makes of `available_bytes`.

    Args:
        counts: layers of each attention type.
        available_bytes: memory for the KV cache on each GPU.
        tokens: `max_model_len`.
        token_bytes: bytes of one token's keys and values in one layer on each GPU.
        block_tokens: tokens of a block.
        in_flight_tokens: `max_num_batched_tokens` x concurrent batches.
        width: layers of a group; None: `group_width`.

    Raises:
        ValueError: there is no layer, or the memory holds no block.
    """
    if not counts:
        raise ValueError("the model has no attention layer; there is no KV cache to allocate")
    block_bytes = (width or group_width(counts)) * block_tokens * token_bytes
    blocks = available_bytes // block_bytes
    if blocks < 1:
        raise ValueError(f"{available_bytes} bytes hold no block of {block_bytes} bytes; give the cache more memory")
    needed = sum(
        groups * most_blocks(tokens, window, block_tokens, in_flight_tokens)
        for window, groups in groups_of(counts, width)
    )
    return Capacity(blocks, blocks / needed)


def vllm_demand(
    counts: WindowCounts,
    lengths: tuple[int, int],
    token_bytes: int,
    block_tokens: int,
    chunk_tokens: int,
    width: int | None = None,
) -> KVDemand:
    """Return the bytes that requests in flight take in vLLM, mean over their decode steps.

    Args:
        counts: layers of each attention type.
        lengths: prompt tokens and generated tokens of a request.
        token_bytes: bytes of one token's keys and values in one layer on each GPU.
        block_tokens: tokens of a block.
        chunk_tokens: prompt tokens in flight; windows hold them beside their own tokens while a prompt is read.
        width: layers of a group; None: `group_width`.
    """
    (prompt, generated), groups = lengths, groups_of(counts, width)
    block_bytes = (width or group_width(counts)) * block_tokens * token_bytes
    request = sum(number * mean_blocks(prompt, generated, window, block_tokens) for window, number in groups)
    chunk = -(-chunk_tokens // block_tokens)
    fixed = 1 + sum(number * chunk for window, number in groups if window is not None)
    return KVDemand(block_bytes * request, float(block_bytes * fixed))
