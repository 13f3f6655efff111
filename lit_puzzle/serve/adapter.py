"""Merge a LoRA adapter of PEFT into the weights of an exported folder: W + (alpha / rank) B A, in float32.

Reads `adapter_config.json` and `adapter_model.safetensors` of an adapter folder. Memory: one merged matrix in float32.
Traffic: the adapter twice, once to check that all of it is finite. Merges only plain LoRA on linear layers; an error
names anything else. Patterns of ranks and alphas are regular expressions of the file, which can take forever: they are
matched in a process of their own with a time limit.

Source: LoRA, arXiv 2106.09685, section 4.1; alpha / sqrt(rank) with `use_rslora`, arXiv 2312.03732.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_puzzle.model.safetensors_file import DTYPES, SafetensorsFile
from lit_puzzle.run.files import read_json
from lit_puzzle.serve.weights import Weight, Weights, converted

PREFIX = "base_model.model."  # PEFT's wrapper around the names of the checkpoint
PARTS = (".lora_A.weight", ".lora_B.weight")
MUST_BE = {"peft_type": "LORA", "use_dora": False, "fan_in_fan_out": False, "bias": "none", "lora_bias": False}
PLAIN_NAME = re.compile(r"[\w.-]+")  # a pattern that is a name: nothing in it can take long to match
MATCHING_SECONDS = 10.0
MATCH = """
import json, re, sys
patterns, stems = json.load(sys.stdin)
compiled = [(pattern, re.compile(rf"(.*\\.)?({pattern})$")) for pattern in patterns]
print(json.dumps([next((pattern for pattern, found in compiled if found.match(stem)), None) for stem in stems]))
"""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of A and B; others (PiSSA, OLoRA) also change the base
MUST_BE_UNSET = (
    "modules_to_save",
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

    def check_targets(self, names: Sequence[str]) -> None:
        """Check that there are tensors for every module that the configuration names.

        Raises:
            ValueError: a module has none.
        """
        targets = self.config.get("target_modules")
        stems = [name.removesuffix(".weight") for name in names]
        for target in targets if isinstance(targets, list) else ():
            if not any(stem == target or stem.endswith(f".{target}") for stem in stems):
                there = sorted({stem.rpartition(".")[2] for stem in stems})
                raise ValueError(
                    f"{self._config_path}: target_modules has {target!r}, for which there are no tensors; there are of "
                    f"{', '.join(there[:5])}"
                )

    def scales(self, names: Iterable[str]) -> dict[str, tuple[int, float]]:
        """Return the rank and the factor of B A of each weight, by its full name.

        Raises:
            ValueError: a rank or an alpha that is no positive number, or patterns that cannot be matched.
        """
        stems = [name.removesuffix(".weight") for name in names]
        ranks, alphas = (self._by_pattern(key, stems) for key in ("rank_pattern", "alpha_pattern"))
        rank = self._rank("r", self.config.get("r"))
        alpha = self._number("lora_alpha", self.config.get("lora_alpha", rank))
        found: dict[str, tuple[int, float]] = {}
        for stem in stems:
            own = self._rank("rank_pattern", ranks.get(stem, rank))
            divisor = math.sqrt(own) if self.config.get("use_rslora") else own
            found[f"{stem}.weight"] = own, self._number("alpha_pattern", alphas.get(stem, alpha)) / divisor
        return found

    @property
    def _config_path(self) -> Path:
        return self.folder / "adapter_config.json"

    def _rank(self, key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self._config_path}: {key} has {value!r}; a rank is a positive whole number")
        return value

    def _number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{self._config_path}: {key} has {value!r}; it must be a positive, finite number")
        return value

    def _by_pattern(self, key: str, stems: list[str]) -> dict[str, Any]:
        """Return what `key` says of modules by PEFT's rule: a pattern matches the end of a module's name."""
        patterns = self.config.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise ValueError(f"{self._config_path}: {key} must be an object, got {type(patterns).__name__}")
        return {stem: patterns[first] for stem, first in self._first_matches(key, [*patterns], stems).items()}

    def _first_matches(self, key: str, patterns: list[str], stems: list[str]) -> dict[str, str]:
        """Return the first pattern that matches each stem that has one."""
        if all(PLAIN_NAME.fullmatch(pattern) for pattern in patterns):
            found = [next((p for p in patterns if re.match(rf"(.*\.)?({p})$", stem)), None) for stem in stems]
        else:
            found = self._matched_outside(key, patterns, stems)
        return {stem: first for stem, first in zip(stems, found, strict=True) if first is not None}

    def _matched_outside(self, key: str, patterns: list[str], stems: list[str]) -> list[str | None]:
        """Match regular expressions in a process of their own, for a limited time."""
        shown = [pattern[:100] for pattern in patterns[:3]]
        command, given = [sys.executable, "-I", "-S", "-c", MATCH], json.dumps([patterns, stems])
        try:
            done = subprocess.run(
                command, input=given, capture_output=True, text=True, check=False, timeout=MATCHING_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"{self._config_path}: matching {key} {shown} took more than {MATCHING_SECONDS:.0f} seconds. Give the "
                "names of the modules instead"
            ) from error
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("re.error: ")[:200]
            raise ValueError(f"{self._config_path}: {key} {shown} cannot be matched: {said}")
        return json.loads(done.stdout)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and B, in float32, for the full name of a weight.

        Raises:
            ValueError: a value is not finite.
        """
        stem = name.removesuffix(".weight")
        keys = [f"{PREFIX}{stem}{part}" for part in PARTS]
        down, up = (self.file.read(key).float() for key in keys)
        for key, matrix in zip(keys, (down, up), strict=True):
            if not matrix.isfinite().all():
                raise ValueError(f"{self.file.path}: {key} has values that are not finite; the adapter is broken")
        return down, up


def merged(weights: Weights, adapter: Adapter, rounded: bool) -> Weights:
    """Return the weights with an adapter merged.

    Args:
        weights: weights of the checkpoint that the adapter was trained on.
        adapter: the adapter.
        rounded: whether each changed weight is rounded to the dtype that it had; otherwise it is left in float32, for a
            later step that rounds it to another dtype.

    Raises:
        ValueError: the adapter is damaged, or changes a weight that the checkpoint does not have or of another shape.
    """
    result = dict(weights)
    names = adapter.names()
    if not names:
        raise ValueError(f"{adapter.file.path} contains no adapter: it has no tensors")
    adapter.check_targets(names)
    scales = adapter.scales(names)
    for name, (rank, factor) in scales.items():
        if name not in weights:
            raise ValueError(f"{adapter.file.path} changes {name}, which the checkpoint does not have")
        down, up = adapter.factors(name)
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != rank or up.shape[1] != rank:
            raise ValueError(
                f"{adapter.file.path}: {name} has matrices {tuple(down.shape)} and {tuple(up.shape)}; the rank is "
                f"{rank}"
            )
        shape = (up.shape[0], down.shape[1])
        if shape != weights[name].shape:
            raise ValueError(f"{adapter.file.path} changes {name} by {shape}; the checkpoint has {weights[name].shape}")
        whole_weight = _merged(weights[name], adapter, name, factor)
        result[name] = converted(name, whole_weight, DTYPES[weights[name].dtype]) if rounded else whole_weight
    return result


def _merged(weight: Weight, adapter: Adapter, name: str, factor: float) -> Weight:
    def read() -> Tensor:
        down, up = adapter.factors(name)
        return weight.read().float() + factor * (up @ down)

    return Weight("F32", weight.shape, read)
