"""Bytes of `search`: a program with one number for each candidate of each layer, whatever the model's size.

Pure functions; imports no torch; reads `config.json` and `library.json`, or the recipe that makes it.
"""

from __future__ import annotations

from pathlib import Path

from lit_puzzle.library.footprint import planned_candidates
from lit_puzzle.model.footprint import model_size
from lit_puzzle.model.planned_shape import planned_config
from lit_puzzle.run.footprint import Assumed, Device, Footprint, Phase
from lit_puzzle.run.recipe import load_recipe, recipe_that_makes
from lit_puzzle.run.recipe_values import Values

SOLVER_BYTES = 64 * 2**20  # of HiGHS, and of the tables of kernel times
BYTES_OF_A_NUMBER = 2000  # of a candidate: its costs at every deployment and batch size, and the solver's rows


def footprint(values: Values, device: Device, assumed: Assumed) -> Footprint:
    """Return the footprint of `search`."""
    folder, notes, rows = values.path("library"), "", 0.0
    maker = recipe_that_makes(folder)
    parent = None if maker is None else load_recipe(maker).value("parent")
    if isinstance(parent, str):
        size = model_size(planned_config(Path(parent)).config)
        found = planned_candidates(folder, size)
        rows, notes = float(found.rows + len(size.layers)), found.assumed
    targets = len(values.get("constraints.sweep") or ()) + 1
    return Footprint(
        "search",
        (Phase("program", {"solver": float(SOLVER_BYTES), "numbers": BYTES_OF_A_NUMBER * rows * targets}),),
        disk={"plan, table and pictures": 1e6},
        notes=(notes,),
    )
