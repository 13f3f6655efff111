"""`lightning run RECIPE --plan`: what a recipe costs, as a table or as JSON, without starting it. Imports no torch.

Options beside the recipe's own overrides: `--gpus=8 --gpu=H100` the devices, `--prompt_tokens=N` what to assume about
prompts, `--document_tokens=N` about documents that are not there yet, `--json` for tools. Reads the recipe,
`config.json` of models that are there, and gpus.json; writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_puzzle.costs.gpus import gpus
from lit_puzzle.footprint.at_hand import SMALL_MODEL, asked_device, gpus_at_hand, node_count, recipe_devices
from lit_puzzle.footprint.collect import Formula, formula_of
from lit_puzzle.footprint.fit import advice, fits
from lit_puzzle.footprint.hours import disk_seconds, efforts, network_seconds, total_seconds
from lit_puzzle.model.layout import count_parameters
from lit_puzzle.run.footprint import Assumed, Device, Footprint
from lit_puzzle.run.recipe import Recipe
from lit_puzzle.run.recipe_values import Values, recipe_values, texts_in

OPTIONS = ("gpus", "gpu", "prompt_tokens", "document_tokens")
TINY_WORLD = "lit_puzzle.tiny."  # its prompts have about 75 tokens
TINY_PROMPT = 75
WRONG_KIND = (TypeError, KeyError, AttributeError, ZeroDivisionError)  # what formulas meet in such values


@dataclass(frozen=True)
class Plan:
    """The costs of a recipe on devices.

    Attributes:
        recipe: path of the recipe.
        footprint: of its stage.
        device: what it was computed for.
        advice: settings that make it fit; empty if it fits.
    """

    recipe: str
    footprint: Footprint
    device: Device
    advice: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value: bytes, FLOPs and seconds."""
        made = self.footprint
        work = {name: {"flops": e.flops, "seconds": e.seconds} for name, e in efforts(made, self.device).items()}
        return {
            "recipe": self.recipe,
            "stage": made.stage,
            "device": vars(self.device) | {"usable_bytes": self.device.usable_bytes},
            "fits": not self.advice,
            "peak_bytes": made.peak_bytes,
            "phases": {phase.name: dict(phase.parts) for phase in made.phases},
            "host_bytes": dict(made.host),
            "disk_bytes": dict(made.disk),
            "network_bytes": dict(made.network),
            "disk_traffic_bytes": dict(made.traffic),
            "work": work,
            "network_seconds": network_seconds(made, self.device),
            "disk_seconds": disk_seconds(made),
            "seconds": total_seconds(made, self.device),
            "advice": list(self.advice),
            "notes": [note for note in made.notes if note],
        }


def split_words(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the options of a plan among the words of a command line, and the recipe's own overrides."""
    options, rest = {}, []
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if word in ("--plan", "--json") or (name in OPTIONS and word.startswith("--")):
            options[name] = value
        else:
            rest.append(word)
    return options, rest


def make_plan(recipe: Recipe, command: str, target: str | None, words: Sequence[str]) -> Plan | None:
    """Return the plan of a recipe; None where its stage is code of the user.

    Args:
        recipe: the loaded recipe.
        command: its command.
        target: dotted name of the stage's function; None for a command of Lightning.
        words: options of the plan and overrides.

    Raises:
        ValueError: a wrong key, option or device.
    """
    options, _ = split_words(words)
    found = formula_and_values(recipe, command, target, words)
    if found is None:
        return None
    formula, values, assumed = found
    device = _device(formula(values, Device("cpu", "cpu", 1, 0.0), assumed), values, options)

    def compute(changed: Values, where: Device) -> Footprint:
        return formula(changed, where, assumed)

    made = compute(values, device)
    if "gpus" not in options and recipe_devices(values) is None:
        made = replace(made, notes=(*made.notes, f"devices: all that there are, {device.count} of them"))
    helps = () if fits(made, device) else tuple(advice(made, values, device, compute))
    return Plan(str(recipe.path), made, device, helps)


def formula_and_values(
    recipe: Recipe, command: str, target: str | None, words: Sequence[str]
) -> tuple[Formula, Values, Assumed] | None:
    """Return what computes a recipe's footprint, and its arguments; None where its stage is code of the user.

    Raises:
        ValueError: a wrong key or option.
    """
    options, rest = split_words(words)
    values = recipe_values(recipe, rest, target)
    formula = formula_of(command, values)
    return None if formula is None else (_in_one_line(formula), values, _assumed(values, options))


def _in_one_line(formula: Formula) -> Formula:
    """Return a formula that says in one line that it was given values of a wrong kind: no parser has seen them."""

    def compute(values: Values, device: Device, assumed: Assumed) -> Footprint:
        try:
            return formula(values, device, assumed)
        except WRONG_KIND as error:
            raise ValueError(
                f"no plan can be made of this recipe: a value is of the wrong kind, or 0 ({type(error).__name__}: "
                f"{error}). Without --plan, the stage names the key."
            ) from error

    return compute


def _assumed(values: Values, options: Mapping[str, str]) -> Assumed:
    tiny = any(text.startswith(TINY_WORLD) for text in texts_in(values.content))
    assumed = Assumed(prompt_tokens=TINY_PROMPT) if tiny else Assumed()
    if "prompt_tokens" in options:
        assumed = replace(assumed, prompt_tokens=_count("prompt_tokens", options))
    return replace(assumed, documents=_count("document_tokens", options)) if "document_tokens" in options else assumed


def _count(name: str, options: Mapping[str, str]) -> int:
    if not (options[name].isascii() and options[name].isdigit()) or int(options[name]) < 1:
        raise ValueError(f"--{name}={options[name]} was given; a whole number of at least 1 is needed.")
    return int(options[name])


def _device(draft: Footprint, values: Values, options: Mapping[str, str]) -> Device:
    """Return the devices that were asked for, else those at hand, else one that suits the model."""
    here = [name for name in gpus_at_hand() if name in gpus()]
    largest = max((count_parameters(work.config) for work in draft.works), default=0)
    name = options.get("gpu") or (here[0] if here else "cpu" if largest < SMALL_MODEL else "H100")
    wanted = _count("gpus", options) if "gpus" in options else recipe_devices(values)
    if wanted is None:
        nodes = max(node_count(values.get(f"{place}.num_nodes", 1)) for place in ("trainer", "fabric"))
        wanted = nodes * (len(here) or (1 if name == "cpu" else 8))
    return asked_device(name, wanted)
