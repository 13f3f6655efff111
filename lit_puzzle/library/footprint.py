"""The candidates of a library that may not be there yet, and the footprint of `library`.

Reads `library.json` where it is there, else the recipe that makes it. Imports no torch; writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_puzzle.library.library import LIBRARY_FILE, Library
from lit_puzzle.model.footprint import ModelSize, model_size
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Phase
from lit_puzzle.run.recipe import load_recipe, recipe_that_makes
from lit_puzzle.run.recipe_values import Values, recipe_values

STAGE = "lit_puzzle.library.candidates.library"
BYTES_OF_AN_INDEX = 6  # of a kept expert in library.json
HELD_BYTES_OF_AN_INDEX = 123  # the candidate's own, and pieces of the text while it is written


@dataclass(frozen=True)
class Candidates:
    """The halves of blocks that a library offers, beside the parent's own.

    Attributes:
        experts: for each layer, the numbers of experts.
        windows: for each layer, the windows.
        assumed: what was assumed; empty if the library was read.
    """

    experts: tuple[tuple[int, ...], ...]
    windows: tuple[tuple[int, ...], ...]
    assumed: str

    @property
    def combined(self) -> int:
        """Candidates of all layers: every half with every other, and the parent's own."""
        return sum((1 + len(e)) * (1 + len(w)) for e, w in zip(self.experts, self.windows, strict=True))

    def kept_experts(self, size: ModelSize) -> int:
        """Experts that all candidates of all layers list."""
        own = zip(size.layers, self.experts, self.windows, strict=True)
        return sum((layer.experts + sum(experts)) * (1 + len(windows)) for layer, experts, windows in own)

    @property
    def rows(self) -> int:
        """Halves of all layers."""
        return sum(map(len, self.experts)) + sum(map(len, self.windows))


def candidates_of(size: ModelSize, experts: list[int], windows: list[int], assumed: str = "") -> Candidates:
    """Return the halves that numbers of experts and windows mean: those smaller than the parent's own."""
    return Candidates(
        tuple(tuple(count for count in experts if count < layer.experts) for layer in size.layers),
        tuple(tuple(w for w in windows if layer.window is None or w < layer.window) for layer in size.layers),
        assumed,
    )


def planned_candidates(folder: Path, size: ModelSize) -> Candidates:
    """Return the halves of a library's folder.

    Raises:
        ValueError: it is not there, and no packaged recipe makes it.
    """
    if (folder / LIBRARY_FILE).is_file():
        layers = Library.load(folder).layers
        kept = [{candidate.block.experts for candidate in layer} for layer in layers]
        windows = [{candidate.block.window_tokens for candidate in layer} for layer in layers]
        sizes = list(zip(kept, size.layers, strict=True))
        return Candidates(
            tuple(tuple(sorted(len(one) for one in found if len(one) < own.experts)) for found, own in sizes),
            tuple(tuple(w for w in found if w not in (None, own.window)) for found, own in zip(windows, size.layers)),
            "",
        )
    name = recipe_that_makes(folder)
    values = _library_recipe(name) if name is not None else None
    if values is None:
        raise ValueError(f"{folder} is not there, and no packaged recipe makes it: what it will offer is unknown.")
    assumed = f"{folder} is not there: the candidates of {name} are assumed"
    return candidates_of(size, _sets(values), values.at("windows"), assumed)


def _library_recipe(name: str) -> Values | None:
    """Return the values of the library's recipe, of itself or of the one that trains its blocks."""
    recipe = load_recipe(name)
    if recipe.value("command") == "library":
        return recipe_values(recipe, (), STAGE)
    model: dict[str, Any] = recipe_values(recipe, (), None).get("model.init_args") or {}
    maker = recipe_that_makes(Path(str(model.get("library"))))
    return None if maker in (None, name) else _library_recipe(str(maker))


def _sets(values: Values) -> list[int]:
    """Return the number of experts of each set: one of each importance, as if no two were the same."""
    return sorted(values.at("experts") * (1 + len(values.get("beside") or {})))


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `library`: headers and scores, no weights."""
    planned = planned_config(values.path("parent"))
    size = model_size(planned.config)
    found = candidates_of(size, _sets(values), values.at("windows"))
    kept = float(found.kept_experts(size))
    return Footprint(
        "library",
        (Phase("candidates", {"candidates and their text": HELD_BYTES_OF_AN_INDEX * kept}),),
        disk={"library.json": BYTES_OF_AN_INDEX * kept},
        notes=(planned.assumed,),
    )
