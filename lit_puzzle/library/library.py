"""The block library: every block that each layer of one parent could become, and where its weights are.

Reads and writes a folder: `library.json` (fingerprint and config.json of the parent, the candidates of every layer)
and, for candidates that were trained, one safetensors file each, named by `weights`: the layer's replaced tensors by
their names inside the layer, expert tensors with the kept rows only. A candidate without a file has the parent's
tensors without the rows of the pruned experts; nothing is copied. Imports no torch.

Names say what differs from the parent's block: `parent` (nothing), `experts=12`, `window=16`, `experts=12,window=16`. A
layer may have several sets of one size, told apart by their origin: `experts=12`, `experts=12@reap`.

Source: arXiv 2602.11937 section 2 (expert counts x windows), arXiv 2411.19146 (block library).
Disk: about 6 bytes per kept expert of every candidate, and the tensors of the trained ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_puzzle.model.layout import layer_blocks
from lit_puzzle.run.files import read_json, write_json
from lit_puzzle.run.identity import Identity, file_identity
from lit_puzzle.run.strict_json import checked_keys
from lit_puzzle.spec import BlockSpec, Plan

LIBRARY_FILE = "library.json"
PARENT = "parent"
ORIGIN = re.compile(r"(experts=\d+)@[a-z][a-z0-9_]*")
_CANDIDATE_KEYS = {"name", "block", "weights"}
_LIBRARY_KEYS = {"parent_fingerprint", "num_parent_experts", "config", "layers"}


@dataclass(frozen=True)
class Candidate:
    """One block that a layer could become.

    Attributes:
        name: what differs from the parent's block, see `candidate_name`; unique in its layer.
        block: kept experts and window.
        weights: name of the safetensors file in the library's folder with its trained tensors; None: it has none.
    """

    name: str
    block: BlockSpec
    weights: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return {"name": self.name, "block": self.block.to_json(), "weights": self.weights}

    @classmethod
    def from_json(cls, data: object) -> Candidate:
        """Make a candidate from the value of `to_json`.

        Raises:
            ValueError: a key is unknown or missing, or a value is of another type.
        """
        values = checked_keys("a candidate", data, _CANDIDATE_KEYS)
        if not isinstance(values["name"], str) or not isinstance(values["weights"], str | None):
            raise ValueError(
                f"a candidate's name and weights must be texts, got {values['name']!r}, {values['weights']!r}"
            )
        return cls(values["name"], BlockSpec.from_json(values["block"]), values["weights"])


def candidate_name(parent: BlockSpec, block: BlockSpec, origin: str | None = None) -> str:
    """Name a block by what differs from the layer's block in the parent.

    Args:
        parent: the layer's block in the parent.
        block: the block.
        origin: where its set of experts is from, if others of as many stand beside it.
    """
    differences = []
    if block.experts != parent.experts:
        differences.append(f"experts={block.num_experts}" + (f"@{origin}" if origin else ""))
    if block.window_tokens != parent.window_tokens:
        differences.append(f"window={block.window_tokens}")
    return ",".join(differences) or PARENT


def parts(candidate: Candidate) -> tuple[str | None, str | None]:
    """Return the names under which the two halves of a candidate, experts and attention, are scored apart.

    Returns:
        `experts=N` or `experts=N@ORIGIN`, None where no expert is pruned; `window=W`, None where the attention is
        unchanged.
    """
    names = candidate.name.split(",")
    return (
        next((name for name in names if name.startswith("experts=")), None),
        next((name for name in names if name.startswith("window=")), None),
    )


@dataclass(frozen=True)
class Library:
    """All candidates of one parent.

    Attributes:
        parent_fingerprint: `lit_puzzle.model.checkpoint.fingerprint` of the parent whose expert indices these are.
        num_parent_experts: largest number of experts in any of the parent's layers.
        config: the parent's config.json.
        layers: the candidates of every layer; the first is the parent's own block, named `parent`.

    Raises:
        ValueError: a candidate does not fit this parent, is not named after its block, or occurs twice.
    """

    parent_fingerprint: str
    num_parent_experts: int
    config: Mapping[str, Any] = field(repr=False)
    layers: tuple[tuple[Candidate, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(tuple(candidates) for candidates in self.layers))
        if not isinstance(self.parent_fingerprint, str) or not self.parent_fingerprint:
            raise ValueError(f"parent_fingerprint must be a non-empty text, got {self.parent_fingerprint!r}")
        own_blocks = parent_blocks(self.config)
        largest = max(block.num_experts for block in own_blocks)
        if self.num_parent_experts != largest:
            raise ValueError(f"num_parent_experts is {self.num_parent_experts}, the parent's config says {largest}")
        if len(self.layers) != len(own_blocks):
            raise ValueError(f"candidates of {len(self.layers)} layers are given; the parent has {len(own_blocks)}")
        for layer, (own, candidates) in enumerate(zip(own_blocks, self.layers, strict=True)):
            _check_layer(layer, own, candidates)

    @property
    def num_layers(self) -> int:
        """Number of layers of the parent."""
        return len(self.layers)

    def plan(self, chosen: list[str] | tuple[str, ...]) -> Plan:
        """Make the plan that takes the candidate named `chosen[layer]` in every layer.

        Raises:
            ValueError: there is not one name per layer, or a layer has no candidate of that name.
        """
        if len(chosen) != self.num_layers:
            raise ValueError(f"{len(chosen)} candidates were chosen for {self.num_layers} layers; give one per layer")
        blocks = tuple(self.candidate(layer, name).block for layer, name in enumerate(chosen))
        return Plan(self.parent_fingerprint, self.num_parent_experts, blocks)

    def candidate(self, layer: int, name: str) -> Candidate:
        """Return the candidate of that name in a layer.

        Raises:
            ValueError: there is none; the message lists those there are.
        """
        found = [candidate for candidate in self.layers[layer] if candidate.name == name]
        if not found:
            names = [candidate.name for candidate in self.layers[layer]]
            raise ValueError(f"layer {layer} has no candidate {name!r}; it has {names}")
        return found[0]

    def trained(self, layer: int, candidate: Candidate) -> tuple[Candidate, ...]:
        """Return the candidates whose files hold the trained tensors of a candidate: itself, or else its two halves."""
        if candidate.weights is not None:
            return (candidate,)
        return tuple(half for half in self.layers[layer] if half.name in parts(candidate) and half.weights is not None)

    def check_parent(self, fingerprint: str) -> None:
        """Check that the library is of this parent.

        Raises:
            ValueError: the fingerprints differ.
        """
        if fingerprint != self.parent_fingerprint:
            raise ValueError(
                f"The library is of parent {self.parent_fingerprint}, not of {fingerprint}: expert indices would mean "
                "other experts. Run recipes/library.yaml on this parent."
            )

    def identity(self, folder: Path) -> Identity:
        """Return the identity of the library in its folder: `library.json` and the files of trained candidates."""
        files = {candidate.weights for layer in self.layers for candidate in layer if candidate.weights is not None}
        return file_identity(folder, [LIBRARY_FILE, *sorted(files)])

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return {
            "parent_fingerprint": self.parent_fingerprint,
            "num_parent_experts": self.num_parent_experts,
            "config": dict(self.config),
            "layers": [[candidate.to_json() for candidate in candidates] for candidates in self.layers],
        }

    @classmethod
    def from_json(cls, data: object) -> Library:
        """Make a library from the value of `to_json`.

        Raises:
            ValueError: a key is unknown or missing, or the candidates are no library.
        """
        values = checked_keys("a library", data, _LIBRARY_KEYS)
        layers, config = values["layers"], values["config"]
        if not isinstance(layers, list) or not all(isinstance(candidates, list) for candidates in layers):
            raise ValueError("layers must be a list of lists of candidates")
        if not isinstance(config, Mapping):
            raise ValueError(f"config must be the parent's config.json, got {type(config).__name__}")
        read = tuple(tuple(Candidate.from_json(candidate) for candidate in candidates) for candidates in layers)
        return cls(values["parent_fingerprint"], values["num_parent_experts"], config, read)

    def save(self, folder: Path) -> None:
        """Write `library.json`; the files of trained candidates must be in the folder already.

        Raises:
            ValueError: one of them is missing.
        """
        self._check_files(folder)
        write_json(folder / LIBRARY_FILE, self.to_json())

    @classmethod
    def load(cls, folder: Path) -> Library:
        """Read what `save` wrote.

        Raises:
            ValueError: a file is missing or damaged.
        """
        file = folder / LIBRARY_FILE
        if not file.is_file():
            raise ValueError(f"{folder} has no {LIBRARY_FILE}. Make it with: lightning run recipes/library.yaml")
        content = read_json(file)
        try:
            library = cls.from_json(content)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        library._check_files(folder)
        return library

    def _check_files(self, folder: Path) -> None:
        for layer, candidates in enumerate(self.layers):
            for candidate in candidates:
                if candidate.weights is not None and not (folder / candidate.weights).is_file():
                    raise ValueError(
                        f"{folder}: the weights {candidate.weights!r} of candidate {candidate.name!r} of layer {layer} "
                        "are not there"
                    )


def parent_blocks(config: Mapping[str, Any]) -> list[BlockSpec]:
    """Return the block of every layer of a parent, from its config.json."""
    return [BlockSpec(tuple(range(experts)), window) for experts, window in layer_blocks(config)]


def _check_layer(layer: int, own: BlockSpec, candidates: tuple[Candidate, ...]) -> None:
    names = [candidate.name for candidate in candidates]
    if not candidates or candidates[0] != Candidate(PARENT, own):
        raise ValueError(f"layer {layer}: the first candidate must be the parent's own block, named {PARENT!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"layer {layer}: candidate names must differ, got {names}")
    kept: dict[str | None, tuple[int, ...]] = {}
    for candidate in candidates:
        where, block = f"layer {layer}, candidate {candidate.name!r}", candidate.block
        if ORIGIN.sub(r"\1", candidate.name) != candidate_name(own, block):
            raise ValueError(f"{where}: its block is {candidate_name(own, block)!r}")
        if block.experts[-1] >= own.num_experts:
            raise ValueError(f"{where} keeps expert {block.experts[-1]}; the parent's layer has {own.num_experts}")
        if own.window_tokens is not None and (block.window_tokens or own.window_tokens + 1) > own.window_tokens:
            raise ValueError(f"{where} has a wider window than the parent's {own.window_tokens}; it can only see less")
        half = parts(candidate)[0]
        if kept.setdefault(half, block.experts) != block.experts:
            raise ValueError(
                f"{where} keeps other experts than another candidate of as many: halves are scored by name; name its "
                f"origin, such as experts={block.num_experts}@reap"
            )
        if any(name != half and experts == block.experts for name, experts in kept.items()):
            raise ValueError(f"{where} keeps the same experts as a candidate of another origin; leave one out")
        if candidate.weights is not None and Path(candidate.weights).name != candidate.weights:
            raise ValueError(f"{where}: weights must name a file in the library's folder, got {candidate.weights!r}")
