"""The scales of an FP8 KV cache, as files: one for the keys and one for the values of each layer of one checkpoint.

Writes and reads `kv_scales.safetensors` (float32 `model.layers.N.self_attn.k_scale` and `.v_scale`, the names serving
engines know: scalars, or one per key/value head) and `kv_scales.json` (fingerprint of the checkpoint, how the scales
were found, and per layer amax, scale, overflow count and headroom). A layer whose cache stays in bf16 has no scale.

stored = round(x / scale) in e4m3, read back = stored * scale; the largest e4m3 number is 448.
headroom = log2(448 scale / amax): how many doublings are left before the largest value seen saturates.

Disk: 8 bytes of tensors and about 300 of text a layer. Source: the released gpt-oss-puzzle-88B (names); arXiv
2602.11937 (one scale per layer for K and V, by amax over calibration data).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_puzzle.model.layout import KV_SCALES, layer_prefix
from lit_puzzle.run.folder import write_atomically

META_FILE, SCALES_FILE = "kv_scales.json", "kv_scales.safetensors"
E4M3_MAX = 448.0  # the largest number that float8_e4m3fn holds


@dataclass(frozen=True)
class TensorScale:
    """Scale of the keys, or of the values, of one layer.

    Attributes:
        amax: Largest magnitude in the calibration data, float32: a scalar, or one per key/value head.
        scale: Of the same shape.
        overflow: Calibration values beyond 448 times the scale; they are stored as 448.
    """

    amax: Tensor
    scale: Tensor
    overflow: int

    @property
    def headroom(self) -> float:
        """log2(448 scale / amax), of the head that has least; negative where values saturate."""
        return float((E4M3_MAX * self.scale.double() / self.amax.double()).log2().min())


@dataclass(frozen=True)
class LayerScales:
    """Scales of one layer."""

    k: TensorScale
    v: TensorScale


@dataclass(frozen=True)
class KVScales:
    """Scales of one checkpoint.

    Attributes:
        fingerprint: `lit_puzzle.model.checkpoint.fingerprint` of the checkpoint.
        method: How a scale follows from the data: `amax`, `percentile` or `mse`.
        rounding: `power_of_two` or `none`.
        tokens: Calibration tokens.
        layers: Per layer; None: the cache of this layer stays in bf16.
    """

    fingerprint: str
    method: str
    rounding: str
    tokens: int
    layers: tuple[LayerScales | None, ...]

    def tensors(self) -> dict[str, Tensor]:
        """The scales by the full names that a checkpoint gives them."""
        found: dict[str, Tensor] = {}
        for layer, scales in enumerate(self.layers):
            if scales is not None:
                k_name, v_name = (layer_prefix(layer) + name for name in KV_SCALES)
                found |= {k_name: scales.k.scale, v_name: scales.v.scale}
        return found

    def save(self, folder: Path) -> None:
        """Writes both files; the json, which says that they are complete, last."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{SCALES_FILE}.partial"
        save_file({name: scale.float().clone() for name, scale in self.tensors().items()}, partial)
        partial.replace(folder / SCALES_FILE)
        meta: dict[str, Any] = {key: vars(self)[key] for key in ("fingerprint", "method", "rounding", "tokens")}
        meta["layers"] = [None if scales is None else _as_json(scales) for scales in self.layers]
        write_atomically(folder / META_FILE, json.dumps(meta, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "KVScales":
        """Reads what `save` wrote.

        Raises:
            ValueError: A file is missing or damaged, the two do not belong together, or a scale is missing, zero,
                negative or not finite (the message names the layer).
        """
        if not ((folder / META_FILE).is_file() and (folder / SCALES_FILE).is_file()):
            raise ValueError(
                f"{folder} lacks {META_FILE} or {SCALES_FILE}. Make them with: lightning run recipes/calibrate_kv.yaml"
            )
        try:
            meta = json.loads((folder / META_FILE).read_text())
            tensors = load_file(folder / SCALES_FILE)
            layers = tuple(
                None if stated is None else _layer(layer, stated, tensors)
                for layer, stated in enumerate(meta["layers"])
            )
            loaded = cls(meta["fingerprint"], meta["method"], meta["rounding"], int(meta["tokens"]), layers)
            unknown = sorted(tensors.keys() - loaded.tensors().keys())
            if unknown:
                raise ValueError(f"{SCALES_FILE} holds {unknown[0]}, of which {META_FILE} does not know")
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"The KV scales in {folder} are damaged ({error}); run the recipe again.") from error
        return loaded

    def check_checkpoint(self, fingerprint: str) -> None:
        """Refuses to be used with another checkpoint.

        Raises:
            ValueError: The fingerprints differ.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"The KV scales are of checkpoint {self.fingerprint}, not of {fingerprint}: other weights have other "
                "keys and values. Run recipes/calibrate_kv.yaml with --model.init_args.checkpoint= this one."
            )


def _as_json(scales: LayerScales) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for kind, one in (("k", scales.k), ("v", scales.v)):
        content |= {f"{kind}_amax": one.amax.tolist(), f"{kind}_scale": one.scale.tolist()}
        content |= {f"{kind}_overflow": one.overflow, f"{kind}_headroom": one.headroom}
    return content


def _layer(layer: int, stated: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerScales:
    parts = []
    for kind, name in zip("kv", KV_SCALES, strict=True):
        full_name = layer_prefix(layer) + name
        if full_name not in tensors:
            raise ValueError(f"{full_name} is missing from {SCALES_FILE}")
        scale, amax = tensors[full_name], torch.tensor(stated[f"{kind}_amax"], dtype=torch.float32)
        if scale.shape != amax.shape:
            raise ValueError(f"{full_name} has shape {tuple(scale.shape)}, its amax in {META_FILE} {tuple(amax.shape)}")
        if scale.tolist() != stated[f"{kind}_scale"]:
            raise ValueError(f"{full_name} is {scale.tolist()}, but {META_FILE} says {stated[f'{kind}_scale']}")
        check_positive(scale, full_name)
        check_positive(amax, f"amax of {kind.upper()} in layer {layer}")
        parts.append(TensorScale(amax, scale, int(stated[f"{kind}_overflow"])))
    return LayerScales(*parts)


def check_positive(numbers: Tensor, what: str) -> None:
    """Refuses zero, negative and infinite numbers and NaN.

    Raises:
        ValueError: Names what it is.
    """
    if not all(math.isfinite(number) and number > 0 for number in numbers.flatten().tolist()):
        raise ValueError(f"{what} is {numbers.tolist()}; it must be positive and finite")
