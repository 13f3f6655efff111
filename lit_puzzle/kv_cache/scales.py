"""Files of FP8 KV scales: one scale for the keys and one for the values of each layer of a checkpoint.

Writes and reads `kv_scales.safetensors` (float32, under the names that serving engines expect, such as
`model.layers.0.self_attn.k_scale`: scalars, or one for each key/value head) and `kv_scales.json` (fingerprint and model
type of the checkpoint, method, and for each layer amax, scale, overflow count and headroom). A layer whose cache stays
in bf16 has no scale.

stored = round(x / scale) in e4m3, read back = stored * scale; the largest e4m3 number is 448.
headroom = log2(448 scale / amax): the number of doublings before the largest calibration value saturates.

Disk: 8 bytes of tensors and about 300 of text for each layer. Source: the child released with the paper (names); arXiv
2602.11937 (one scale per layer for K and V, by amax over calibration data).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_puzzle.model.family import family_named
from lit_puzzle.model.layout import layer_prefix
from lit_puzzle.run.files import read_json, write_json
from lit_puzzle.run.identity import Identity, file_identity
from lit_puzzle.run.strict_json import check_whole

META_FILE, SCALES_FILE = "kv_scales.json", "kv_scales.safetensors"
HEAD = ("fingerprint", "model_type", "method", "rounding", "tokens")  # what the JSON file says of all layers
E4M3_MAX = 448.0  # the largest number of float8_e4m3fn

Window = int | None  # tokens; None: full attention
ScalePair = tuple[Tensor, Tensor]  # of the keys and the values of a layer; each a scalar or (G)


@dataclass(frozen=True)
class TensorScale:
    """Scale of the keys, or of the values, of one layer.

    Attributes:
        amax: largest magnitude in the calibration data, float32: a scalar, or one for each key/value head.
        scale: scale, of the same shape.
        overflow: number of calibration values beyond 448 * scale, which saturate.
    """

    amax: Tensor
    scale: Tensor
    overflow: int

    @property
    def headroom(self) -> float:
        """Least log2(448 scale / amax) of all heads; negative if values saturate."""
        return float((E4M3_MAX * self.scale.double() / self.amax.double()).log2().min())


@dataclass(frozen=True)
class LayerScales:
    """Scales of the keys and the values of one layer."""

    k: TensorScale
    v: TensorScale


def scales_identity(folder: Path) -> Identity:
    """Return the identity of the scales in a folder."""
    return file_identity(folder, [SCALES_FILE, META_FILE])


@dataclass(frozen=True)
class KVScales:
    """Scales of one checkpoint.

    Attributes:
        fingerprint: `lit_puzzle.model.checkpoint.fingerprint` of the checkpoint.
        model_type: model type of the checkpoint, whose family names the scales.
        method: how scales follow from the data: `amax`, `percentile` or `mse`.
        rounding: `power_of_two` or `none`.
        tokens: number of calibration tokens.
        layers: scales of each layer; None for a layer whose cache stays in bf16.
    """

    fingerprint: str
    model_type: str
    method: str
    rounding: str
    tokens: int
    layers: tuple[LayerScales | None, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Return the scales under their full names in a checkpoint."""
        found: dict[str, Tensor] = {}
        names = family_named(self.model_type).layer.kv_scales
        for layer, scales in enumerate(self.layers):
            if scales is not None:
                k_name, v_name = (layer_prefix(layer) + name for name in names)
                found |= {k_name: scales.k.scale, v_name: scales.v.scale}
        return found

    def save(self, folder: Path) -> None:
        """Write both files into `folder`; the JSON file, which marks them as complete, last."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{SCALES_FILE}.partial"
        save_file({name: scale.float().clone() for name, scale in self.tensors().items()}, partial)
        partial.replace(folder / SCALES_FILE)
        meta: dict[str, Any] = {key: vars(self)[key] for key in HEAD}
        meta["layers"] = [None if scales is None else _as_json(scales) for scales in self.layers]
        write_json(folder / META_FILE, meta)

    @classmethod
    def load(cls, folder: Path) -> "KVScales":
        """Read the files that `save` wrote.

        Raises:
            ValueError: a file is missing or damaged, the two disagree, or a scale is missing, zero, negative or not
                finite (the message names the layer).
        """
        if not ((folder / META_FILE).is_file() and (folder / SCALES_FILE).is_file()):
            raise ValueError(
                f"{folder} lacks {META_FILE} or {SCALES_FILE}. Make them with: lightning run recipes/calibrate_kv.yaml"
            )
        try:
            meta = read_json(folder / META_FILE)
            _check_head(meta)
            tensors = load_file(folder / SCALES_FILE)
            names = family_named(meta["model_type"]).layer.kv_scales
            layers = tuple(
                None if stated is None else _layer([layer_prefix(layer) + name for name in names], stated, tensors)
                for layer, stated in enumerate(meta["layers"])
            )
            loaded = cls(layers=layers, **{key: meta[key] for key in HEAD})
            if loaded.rounding == "power_of_two":
                _check_powers(loaded.tensors())
            unknown = sorted(tensors.keys() - loaded.tensors().keys())
            if unknown:
                raise ValueError(f"{SCALES_FILE} contains {unknown[0]}, which is not in {META_FILE}")
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, OSError, SafetensorError) as error:
            files = f"{META_FILE}, {SCALES_FILE}"
            raise ValueError(
                f"The KV scales in {folder} ({files}) are damaged ({error}); run the recipe again."
            ) from error
        return loaded

    def check_checkpoint(self, fingerprint: str) -> None:
        """Check that the scales are of the checkpoint with this fingerprint.

        Raises:
            ValueError: the fingerprints differ.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"The KV scales are of checkpoint {self.fingerprint}, not of {fingerprint} (fingerprints): different "
                "weights have different keys and values. Run recipes/calibrate_kv.yaml with this checkpoint as "
                "--model.init_args.checkpoint."
            )


def check_shape(scales: KVScales, layers: int, heads: int) -> None:
    """Check that scales have the layers and the key/value heads of a checkpoint.

    Raises:
        ValueError: they have others.
    """
    if len(scales.layers) != layers:
        raise ValueError(f"the KV scales are of {len(scales.layers)} layers, the checkpoint has {layers}")
    for name, scale in scales.tensors().items():
        if tuple(scale.shape) not in ((), (heads,)):
            raise ValueError(
                f"{name} has shape {tuple(scale.shape)}; it must be a scalar or one for each of {heads} heads"
            )


def _as_json(scales: LayerScales) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for kind, one in (("k", scales.k), ("v", scales.v)):
        content |= {f"{kind}_amax": one.amax.tolist(), f"{kind}_scale": one.scale.tolist()}
        content |= {f"{kind}_overflow": one.overflow, f"{kind}_headroom": one.headroom}
    return content


def _layer(names: Sequence[str], stated: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerScales:
    parts = []
    for kind, full_name in zip("kv", names, strict=True):
        if full_name not in tensors:
            raise ValueError(f"{full_name} is missing from {SCALES_FILE}")
        scale, amax = tensors[full_name], torch.tensor(stated[f"{kind}_amax"], dtype=torch.float32)
        if scale.shape != amax.shape:
            raise ValueError(f"{full_name} has shape {tuple(scale.shape)}, its amax in {META_FILE} {tuple(amax.shape)}")
        if scale.tolist() != stated[f"{kind}_scale"]:
            raise ValueError(f"{full_name} is {scale.tolist()}, but {META_FILE} says {stated[f'{kind}_scale']}")
        check_positive(scale, full_name)
        check_positive(amax, f"the amax of {full_name}")
        check_whole(full_name, "overflow", stated[f"{kind}_overflow"], 0)
        parts.append(TensorScale(amax, scale, stated[f"{kind}_overflow"]))
    return LayerScales(*parts)


def _check_head(meta: Mapping[str, Any]) -> None:
    """Check what the JSON file says of all layers, but for the model type."""
    allowed = {"method": ("amax", "percentile", "mse"), "rounding": ("power_of_two", "none")}
    for key, values in allowed.items():
        if meta[key] not in values:
            raise ValueError(f"{key} is {meta[key]!r}; allowed: {', '.join(values)}")
    if not isinstance(meta["fingerprint"], str):
        raise ValueError(f"fingerprint is {meta['fingerprint']!r}; it must be text")
    check_whole(META_FILE, "tokens", meta["tokens"], 1)


def _check_powers(scales: Mapping[str, Tensor]) -> None:
    for name, scale in scales.items():
        mantissa, _ = torch.frexp(scale.double())
        if not bool((mantissa == 0.5).all()):
            raise ValueError(f"{name} is {scale.tolist()}, no power of two, but {META_FILE} says rounding power_of_two")


def check_positive(numbers: Tensor, what: str) -> None:
    """Check that all numbers are positive and finite.

    Raises:
        ValueError: one is not; the message begins with `what`.
    """
    if not all(math.isfinite(number) and number > 0 for number in numbers.flatten().tolist()):
        raise ValueError(f"{what} is {numbers.tolist()}; it must be positive and finite")
