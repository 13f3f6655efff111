"""Bytes of `search`: a program with a column for each candidate of each layer, whatever the model's size.

    4 MiB + 3,450 bytes for each candidate (combinations of experts and window) and target + tables of kernel times

Pure functions; imports no torch; reads `config.json` and `library.json`, or the recipe that makes it.
"""

from __future__ import annotations

from pathlib import Path

from lit_puzzle.library.footprint import Candidates, planned_candidates
from lit_puzzle.library.library import LIBRARY_FILE, Library
from lit_puzzle.model.footprint import model_size
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Phase
from lit_puzzle.run.recipe import load_recipe, recipe_that_makes
from lit_puzzle.run.recipe_values import Values

SOLVER_BYTES = 4.0 * 2**20  # of HiGHS with a small program, reports and pictures
BYTES_OF_A_CANDIDATE = 3450  # its costs at every batch size of a target, its experts, and the solver's columns and rows
TABLES_BYTES = 64 * 2**20  # of measured kernel times, at most


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `search`."""
    folder = values.path("library")
    found = _candidates(folder)
    targets = max(len(values.get("constraints.targets") or ()), 1)
    held = {"solver": float(SOLVER_BYTES)}
    if found is not None:
        held["candidates"] = float(BYTES_OF_A_CANDIDATE * targets * found.combined)
    if str(values.get("costs.times.class_path")).endswith(".MeasuredKernels"):
        held["tables of kernel times"] = float(TABLES_BYTES)
    return Footprint(
        "search",
        (Phase("program", held),),
        disk={"plan, table and pictures": 1e6},
        notes=(found.assumed if found is not None else "candidates that nobody knows yet are left out",),
    )


def _candidates(folder: Path) -> Candidates | None:
    """Return the candidates of a library, or of the recipe that makes it; None where there is neither."""
    if (folder / LIBRARY_FILE).is_file():
        return planned_candidates(folder, model_size(Library.load(folder).config))
    maker = recipe_that_makes(folder)
    parent = None if maker is None else load_recipe(maker).value("parent")
    return (
        planned_candidates(folder, model_size(planned_config(Path(parent)).config)) if isinstance(parent, str) else None
    )
