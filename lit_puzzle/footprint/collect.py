"""Which room's footprint belongs to which command or class of a recipe.

The door of all footprints: the only file that names those of every room. Imports no torch; reads what they read.
"""

from __future__ import annotations

from collections.abc import Callable

import lit_puzzle.distill.footprint
import lit_puzzle.rl.footprint
from lit_puzzle.run.footprint import Assumed, Device, Footprint
from lit_puzzle.run.recipe_values import Values

Formula = Callable[[Values, Device, Assumed], Footprint]
OF_MODELS: dict[str, Formula] = {  # commands of Lightning: by the class of their model
    "lit_puzzle.rl.module.RLRecovery": lit_puzzle.rl.footprint.footprint,
    "lit_puzzle.distill.global_kd.GlobalDistillation": lit_puzzle.distill.footprint.footprint,
}
OF_STAGES: dict[str, Formula] = {}


def formula_of(command: str, values: Values) -> Formula | None:
    """Return the footprint of a recipe's stage; None for code of the user, whose costs nobody knows."""
    if command in OF_STAGES:
        return OF_STAGES[command]
    return OF_MODELS.get(str(values.get("model.class_path")))
