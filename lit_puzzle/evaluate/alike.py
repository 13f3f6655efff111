"""Whether two evaluations can be compared: what their runs have recorded of problems, grading and sampling.

Reads `config.yaml` and `inputs.json` of the runs; writes nothing. What a run has not recorded is not compared. Needs no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_puzzle.run.folder import CONFIG
from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import enclosing_run, recorded_inputs
from lit_puzzle.run.recipe import Recipe, load_recipe

SAME = ("sampling", "held_out.samples_per_prompt", "held_out.answer_format")  # keys of both evaluations
DRAWN = ("held_out.seed", "held_out.prompts_per_effort", "held_out.efforts")  # of the problems


def check_alike(folders: Mapping[str, Path], asked: Identity | None = None, more: tuple[str, ...] = ()) -> None:
    """Check that two evaluations drew, read and graded alike.

    Args:
        folders: run folders of two evaluations, or folders of episodes in them, by what messages call them.
        asked: problems of the second one, if it has not claimed them yet.
        more: further keys of recipes that must be the same.

    Raises:
        ValueError: they differ; the message names key and values.
    """
    recorded, problems = [], []
    for folder in folders.values():
        run = enclosing_run(folder)
        recipe = None if run is None or not (run / CONFIG).is_file() else load_recipe(str(run / CONFIG))
        known = {} if run is None else recorded_inputs(run)
        problems.append(known["held_out"].content if "held_out" in known else None)
        recorded.append({key: None if recipe is None else _value(recipe, key) for key in (*SAME, *more, *DRAWN)})
    if asked is not None:
        problems[1] = asked.content
    has_others = None not in problems and problems[0] != problems[1]
    first, second = folders
    for key, old in recorded[0].items():
        new = recorded[1][key]
        if old != new and None not in (old, new) and (key not in DRAWN or has_others):
            raise ValueError(
                f"{key} of {first} is {old}, of {second} {new}: the two cannot be compared. Evaluate both with the "
                "same settings."
            )
    if has_others:  # by files or a template that have changed, or by a grader
        raise ValueError(
            f"{first} {folders[first]} and {second} {folders[second]} have other problems, right answers or graders: "
            "the two cannot be compared. Evaluate both with the same settings and the same files."
        )


def _value(recipe: Recipe, key: str) -> Any:
    """Return the value of a dotted key, or None."""
    name, *rest = key.split(".")
    value = recipe.value(name)
    for part in rest:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
