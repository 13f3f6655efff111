"""Rows of a KV cache: store keys as small as values, and gather rows of several caches into one.

Every row of a batch ends in the last column; shorter rows are padded on the left. With W columns in all, a layer with
full attention stores W of them and a layer with a window the last min(W, window - 1), as transformers' layers do.

Reads and writes nothing. Memory of `gather_rows`: its result beside its sources; with `free`, one layer of it.
Shapes: B rows, G key/value heads, W columns, C channels of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class CompactCache(DynamicCache):
    """A cache whose keys are stored in the dtype of the values, which is that of the projections.

    Under autocast the rotary tables may be float32, and keys with them. Their products with queries are computed in
    autocast's dtype all the same: storing keys in it changes no result and halves their memory.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all that the layer holds."""
        return super().update(key_states.to(value_states.dtype), value_states, layer_idx, *args, **kwargs)


def check_layers(cache: Cache) -> None:
    """Refuse caches whose rows cannot be gathered.

    Raises:
        ValueError: a layer is neither one of full attention nor one with a window that grows as it is filled.
    """
    other = {
        type(layer).__name__ for layer in cache.layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
    }
    if other:
        raise ValueError(
            f"The model's KV cache has layers {sorted(other)}; the transformers engine knows full attention and "
            "sliding windows. Use engine vllm."
        )


def gather_rows(parts: Sequence[tuple[Cache, Sequence[int]]], empty: Cache, width: int, free: bool) -> Cache:
    """Fill a cache with rows of other caches, one below the other.

    Args:
        parts: caches and which of their rows are wanted, in order.
        empty: a new cache of the same model, which gets the rows.
        width: columns of the result; columns that a source has beyond them must be padding in the wanted rows.
        free: let go of the sources layer by layer; they cannot be used afterwards.

    Returns:
        `empty`, filled.
    """
    for index, layer in enumerate(empty.layers):
        sources = [(cache.layers[index], rows) for cache, rows in parts]
        windowed = isinstance(layer, DynamicSlidingWindowLayer)
        columns = min(width, layer.sliding_window - 1) if windowed else width
        keys = torch.cat([_fit(source.keys, rows, columns) for source, rows in sources])
        values = torch.cat([_fit(source.values, rows, columns) for source, rows in sources])
        if free:
            for source, _ in sources:
                source.keys = source.values = None
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if windowed:
            layer.cumulative_length = width
    return empty


def _fit(stored_BGWC: Tensor, rows: Sequence[int], columns: int) -> Tensor:
    """Return some rows with the last `columns` columns, padded on the left where there are fewer."""
    stored = stored_BGWC.shape[2]
    last_BGWC = stored_BGWC[:, :, max(stored - columns, 0) :]
    if list(rows) != list(range(len(stored_BGWC))):
        last_BGWC = last_BGWC.index_select(0, torch.tensor(rows, device=stored_BGWC.device))
    return pad(last_BGWC, (0, 0, columns - stored, 0)) if columns > stored else last_BGWC
