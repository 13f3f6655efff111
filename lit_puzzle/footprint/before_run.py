"""The plan that a run prints before it starts, and its refusal where it cannot fit. Imports no torch.

A plan that cannot be made (an input is missing) does not stop a run: the stage's own message says more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lit_puzzle.footprint.at_hand import asked_device, gpus_at_hand, recipe_devices
from lit_puzzle.footprint.fit import advice, fits, refusal
from lit_puzzle.footprint.plan import Plan, formula_and_values
from lit_puzzle.footprint.table import short_line
from lit_puzzle.run.footprint import Device, Footprint
from lit_puzzle.run.recipe import Recipe
from lit_puzzle.run.recipe_values import Values

FORCE = "--force"


def device_at_hand(values: Values) -> Device | None:
    """Return the device that a run will use here; None for a GPU whose memory is not known."""
    here, accelerator = gpus_at_hand(), str(values.get("trainer.accelerator") or values.get("fabric.accelerator") or "")
    wanted = recipe_devices(values)
    if here and accelerator != "cpu":
        return None if here[0] == "other" else asked_device(here[0], wanted or len(here))
    return asked_device("cpu", wanted or 1)


def check_fit(recipe: Recipe, command: str, target: str | None, words: Sequence[str], force: bool) -> None:
    """Print the plan of a run in one line, and refuse the run if it cannot fit.

    Args:
        recipe: the loaded recipe.
        command: its command.
        target: dotted name of the stage's function; None for a command of Lightning.
        words: overrides.
        force: starts it whatever the plan says.

    Raises:
        ValueError: it cannot fit the device at hand; the message names the number and the settings that would help.
    """
    try:
        found = formula_and_values(recipe, command, target, words)
        device = None if found is None else device_at_hand(found[1])
        made = None if found is None or device is None else found[0](found[1], device, found[2])
    except ValueError:  # an input that is not there, or a value that the stage refuses in words of its own
        return
    if found is None or device is None or made is None:
        return
    formula, values, assumed = found

    def compute(changed: Values, where: Device) -> Footprint:
        return formula(changed, where, assumed)

    print(short_line(Plan(str(recipe.path), replace(made, works=()), device, ())), flush=True)
    if not fits(made, device) and not force:
        raise ValueError(refusal(made, device, advice(made, values, device, compute)))
