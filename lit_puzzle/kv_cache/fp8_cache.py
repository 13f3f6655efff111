"""The model under an FP8 KV cache, simulated: keys and values are stored as e4m3 and read back with their scales.

Rounds to nearest, as GPUs do. For generation (`past_key_values=Fp8Cache(...)` of transformers' `generate`) and for
whole sequences (a fresh cache in one forward pass): attention reads nothing but what was stored, the newest token
included. Layers without scales, and every window, are as transformers has them.

Reads KV scales, from their own folder or from a checkpoint that carries them. Memory: 1 byte for each key and value of
the cache, and while a layer runs its whole cache in the model's dtype: slower than the model, on purpose.
Source: formulas in `lit_puzzle.kv_cache.fp8`; the shapes are those of transformers' caches (B, G, T, C).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from lit_puzzle.kv_cache.fp8 import dequantize, quantize
from lit_puzzle.kv_cache.kv_scales import KVScales, check_positive
from lit_puzzle.kv_cache.kv_statistics import Scales, Window
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import KV_SCALES, layer_prefix


class Fp8Cache(DynamicCache):
    """A cache whose layers hold float8_e4m3fn.

    Args:
        config: of the model.
        scales: for each layer of keys and values; None: it stores what it is given.
    """

    def __init__(self, config: PreTrainedConfig, scales: Sequence[Scales | None]) -> None:
        super().__init__(config=config)
        self.scales = scales

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new keys and values; returns all that the layer holds, as it reads them."""
        scales = self.scales[layer_idx]
        if scales is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        k_scale, v_scale = (scale.to(key_states.device) for scale in scales)
        new = quantize(key_states, k_scale), quantize(value_states, v_scale)
        keys, values = super().update(*new, layer_idx, *args, **kwargs)
        return dequantize(keys, k_scale, key_states.dtype), dequantize(values, v_scale, value_states.dtype)


def scales_for(checkpoint: Path, kv_scales: Path | None) -> list[Scales | None]:
    """The scales that a serving engine would use for a checkpoint with an FP8 cache.

    Args:
        checkpoint: Its folder.
        kv_scales: Folder of scales; None: those that the checkpoint carries (a windowed layer without any keeps its
            cache as it is), and 1 everywhere where it carries none.

    Raises:
        ValueError: The scales are of another checkpoint or damaged, or one is missing.
    """
    opened = Checkpoint(checkpoint)
    if kv_scales is not None:
        found = KVScales.load(kv_scales)
        found.check_checkpoint(opened.fingerprint())
        return layer_scales(found)
    if not any(name.endswith(KV_SCALES) for name in opened.tensors):
        return [(torch.tensor(1.0), torch.tensor(1.0))] * opened.num_layers
    return [_carried(opened, layer, window) for layer, (_, window) in enumerate(opened.blocks)]


def layer_scales(scales: KVScales) -> list[Scales | None]:
    """Only the scales, as `Fp8Cache` takes them."""
    return [None if layer is None else (layer.k.scale, layer.v.scale) for layer in scales.layers]


def _carried(checkpoint: Checkpoint, layer: int, window: Window) -> Scales | None:
    """The scales of a layer in a checkpoint that carries some; `Checkpoint` has seen to it that none is alone."""
    k_name, v_name = (layer_prefix(layer) + name for name in KV_SCALES)
    if k_name in checkpoint.tensors:
        return _read(checkpoint, k_name), _read(checkpoint, v_name)
    if window is None:
        raise ValueError(
            f"{checkpoint.folder} carries KV scales, but no {k_name}; only windowed layers may have none. Run "
            "recipes/calibrate_kv.yaml on it and give the result as kv_scales."
        )
    return None


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    scale = checkpoint.read(name).float()
    check_positive(scale, name)
    return scale.squeeze() if scale.numel() == 1 else scale
