"""Simulate an FP8 KV cache: keys and values are stored as e4m3 and read back with their scales.

Rounds to nearest, as GPUs do. Works in generation (`past_key_values=Fp8Cache(...)`) and over whole sequences (a new
cache in one forward pass): attention reads only stored values, those of the newest token too. Layers without scales and
the windows of layers are those of transformers' own cache.

Reads KV scales from their own folder, or from a checkpoint that contains them. Memory: 1 byte for each stored key and
value, and the whole cache of one layer in the model's dtype while that layer runs. Slower than the model's own cache:
it is for measuring the quality loss.
Source: formulas in `lit_puzzle.kv_cache.fp8`; the shapes are those of transformers' caches (B, G, T, C).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from lit_puzzle.kv_cache.fp8 import dequantize, quantize
from lit_puzzle.kv_cache.scales import KVScales, ScalePair, Window, check_positive, check_shape
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import layer_prefix, whole


class Fp8Cache(DynamicCache):
    """KV cache whose layers store float8_e4m3fn.

    Args:
        config: configuration of the model.
        scales: scales of each layer's keys and values; a layer with None stores them unchanged.
    """

    def __init__(self, config: PreTrainedConfig, scales: Sequence[ScalePair | None]) -> None:
        super().__init__(config=config)
        self.scales = scales

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all of the layer's, as attention reads them."""
        scales = self.scales[layer_idx]
        if scales is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        k_scale, v_scale = (scale.to(key_states.device) for scale in scales)
        new = quantize(key_states, k_scale), quantize(value_states, v_scale)
        keys, values = super().update(*new, layer_idx, *args, **kwargs)
        return dequantize(keys, k_scale, key_states.dtype), dequantize(values, v_scale, value_states.dtype)


def scales_for(checkpoint: Path, kv_scales: Path | None) -> list[ScalePair | None]:
    """Return the scales that a serving engine would use for a checkpoint with an FP8 cache.

    Args:
        checkpoint: folder of the checkpoint.
        kv_scales: folder of scales; None uses those in the checkpoint (a windowed layer without scales keeps its own
            cache), or 1 everywhere if the checkpoint contains none.

    Raises:
        ValueError: the scales are of another checkpoint or damaged, or one is missing.
    """
    opened = Checkpoint(checkpoint)
    if kv_scales is not None:
        found = KVScales.load(kv_scales)
        found.check_checkpoint(opened.fingerprint())
        check_shape(found, opened.num_layers, whole(opened.config, "num_key_value_heads"))
        return layer_scales(found)
    if not any(name.endswith(opened.family.layer.kv_scales) for name in opened.tensors):
        return [(torch.tensor(1.0), torch.tensor(1.0))] * opened.num_layers
    return [_scales_in(opened, layer, window) for layer, (_, window) in enumerate(opened.blocks)]


def layer_scales(scales: KVScales) -> list[ScalePair | None]:
    """Return only the scales, as `Fp8Cache` takes them."""
    return [None if layer is None else (layer.k.scale, layer.v.scale) for layer in scales.layers]


def _scales_in(checkpoint: Checkpoint, layer: int, window: Window) -> ScalePair | None:
    """Return the scales of a layer; `Checkpoint` has checked that keys and values have both or none."""
    k_name, v_name = (layer_prefix(layer) + name for name in checkpoint.family.layer.kv_scales)
    if k_name in checkpoint.tensors:
        return _read(checkpoint, k_name), _read(checkpoint, v_name)
    if window is None:
        raise ValueError(
            f"{checkpoint.folder} contains KV scales, but no {k_name}; only windowed layers may have none. Run "
            "recipes/calibrate_kv.yaml on it and give the result as kv_scales."
        )
    return None


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    scale = checkpoint.read(name).float()
    check_positive(scale, name)
    return scale.squeeze() if scale.numel() == 1 else scale
