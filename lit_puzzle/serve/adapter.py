"""Merge a LoRA adapter of PEFT into the weights of an exported folder: W + (alpha / rank) B A, in float32.

Reads `adapter_config.json` and `adapter_model.safetensors` of an adapter folder. Memory: one merged matrix in float32.
Traffic: the adapter once. Merges only plain LoRA on linear layers; an error names anything else.

Source: LoRA, arXiv 2106.09685, section 4.1; alpha / sqrt(rank) with `use_rslora`, arXiv 2312.03732.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_puzzle.model.layout import whole
from lit_puzzle.model.safetensors_file import DTYPES, SafetensorsFile
from lit_puzzle.run.files import read_json
from lit_puzzle.serve.weights import Weight, Weights

PREFIX = "base_model.model."  # PEFT's wrapper around the names of the checkpoint
PARTS = (".lora_A.weight", ".lora_B.weight")
MUST_BE = {"peft_type": "LORA", "use_dora": False, "fan_in_fan_out": False, "bias": "none", "lora_bias": False}
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of A and B; others (PiSSA, OLoRA) also change the base
MUST_BE_UNSET = (
    *("alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora"),
    *("monteclora_config", "kasa_config", "arrow_config"),
)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, opened and checked.

    Attributes:
        folder: the folder.
        config: content of adapter_config.json.
        file: tensors of the adapter.
    """

    folder: Path
    config: Mapping[str, Any]
    file: SafetensorsFile

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Open an adapter folder.

        Raises:
            ValueError: the folder has no safetensors file, or the adapter is not plain LoRA.
        """
        config = read_json(folder / "adapter_config.json")
        plain = {
            **{key: config.get(key, allowed) == allowed for key, allowed in MUST_BE.items()},
            **{key: not config.get(key) for key in MUST_BE_UNSET},
            "init_lora_weights": config.get("init_lora_weights", True) in PLAIN_STARTS,
        }
        for key in (key for key, is_plain in plain.items() if not is_plain):
            raise ValueError(
                f"{folder}: {key} is {config[key]!r}; only plain LoRA on an unchanged base can be merged here. "
                "Merge the adapter with PEFT and export the merged checkpoint"
            )
        path = folder / "adapter_model.safetensors"
        if not path.is_file():
            raise ValueError(f"{path} is missing; an adapter saved as a pickle is refused: save it as safetensors")
        return cls(folder, config, SafetensorsFile(path))

    def names(self) -> list[str]:
        """Return the full names of the weights that the adapter changes.

        Raises:
            ValueError: a tensor is not a LoRA matrix, or the other matrix of its product is missing.
        """
        names = []
        for key in self.file.tensors:
            part = next((part for part in PARTS if key.endswith(part)), None)
            if part is None or not key.startswith(PREFIX):
                raise ValueError(f"{self.file.path}: {key} is not a LoRA matrix of a linear layer; it cannot be merged")
            stem = key.removesuffix(part)
            if not {stem + part for part in PARTS} <= self.file.tensors.keys():
                raise ValueError(f"{self.file.path}: {key} is present without the other matrix of its product")
            if part == PARTS[0]:
                names.append(stem.removeprefix(PREFIX) + ".weight")
        return names

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """Return A, B and the factor of their product, for the full name of a weight."""
        stem = name.removesuffix(".weight")
        down, up = (self.file.read(f"{PREFIX}{stem}{part}").float() for part in PARTS)
        rank = self._pattern("rank_pattern", stem, whole(self.config, "r"))
        alpha = self._pattern("alpha_pattern", stem, self.config.get("lora_alpha", rank))
        if down.shape[0] != rank or up.shape[1] != rank:
            raise ValueError(
                f"{self.file.path}: {name} has matrices {tuple(down.shape)} and {tuple(up.shape)}; the rank is {rank}"
            )
        return down, up, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _pattern(self, key: str, stem: str, default: float) -> float:
        """Return a value by PEFT's rule: a pattern is a regular expression that matches the end of a module's name."""
        patterns = self.config.get(key) or {}
        return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", stem)), default)


def merged(weights: Weights, adapter: Adapter) -> Weights:
    """Return the weights with an adapter merged; each changed weight is rounded once, to the dtype it had.

    Raises:
        ValueError: the adapter changes a weight that the checkpoint does not have, or of another shape.
    """
    result = dict(weights)
    for name in adapter.names():
        if name not in weights:
            raise ValueError(f"{adapter.file.path} changes {name}, which the checkpoint does not have")
        down, up, _ = adapter.factors(name)
        shape = (up.shape[0], down.shape[1])
        if shape != weights[name].shape:
            raise ValueError(f"{adapter.file.path} changes {name} by {shape}; the checkpoint has {weights[name].shape}")
        result[name] = _merged(weights[name], adapter, name)
    return result


def _merged(weight: Weight, adapter: Adapter, name: str) -> Weight:
    def read() -> Tensor:
        down, up, factor = adapter.factors(name)
        return (weight.read().float() + factor * (up @ down)).to(DTYPES[weight.dtype])

    return Weight(weight.dtype, weight.shape, read)
