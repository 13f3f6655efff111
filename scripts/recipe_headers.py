"""Writes what a recipe costs into its header, one line that begins with `# Cost`, from the same function as `--plan`.

    python scripts/recipe_headers.py            writes the lines of recipes/gpt_oss_20b and recipes/gpt_oss_120b
    python scripts/recipe_headers.py --check    names the recipes whose line is not what the plan says

Devices are those that the line names already (`# Cost (16 x H200): `, change it there); else 8 H100 a node, or as many
as the recipe names; one in a folder `one_gpu`. `Cost: lightning run RECIPE --plan` at the end of a line, as somebody
typed it, is replaced. Reads and writes recipes.
"""

import re
import sys
from pathlib import Path

from lit_puzzle.cli import LIGHTNING_COMMANDS, STAGES
from lit_puzzle.footprint.at_hand import recipe_devices
from lit_puzzle.footprint.hours import total_seconds
from lit_puzzle.footprint.plan import Plan, formula_and_values, make_plan
from lit_puzzle.footprint.table import shown_bytes, shown_seconds
from lit_puzzle.run.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
FOLDERS = ("gpt_oss_20b", "gpt_oss_120b")
TYPED = re.compile(r"\s*Cost: lightning run \S+ --plan(?: --gpus=(?P<count>\d+))?(?: --gpu=(?P<gpu>\w+))?\.?$")
WRITTEN = re.compile(r"# Cost \((?P<count>\d+) x (?P<gpu>\w+)\)")
LINE = "# Cost"
NODE, GPU = 8, "H100"


def target_of(recipe: Recipe) -> tuple[str, str | None] | None:
    """Return command and dotted function of a recipe; None where it is a base only."""
    command = recipe.value("command")
    if not isinstance(command, str):
        return None
    return command, None if command in LIGHTNING_COMMANDS else STAGES[command][0]


def devices_of(recipe: Recipe, path: Path) -> tuple[int, str]:
    """Return the devices that the line is for: those that it names already, else those of the recipe."""
    for row in path.read_text().split("\n"):
        found = WRITTEN.match(row) or (TYPED.search(row) if row.startswith("#") else None)
        if found and found["count"]:
            return int(found["count"]), found["gpu"] or GPU
    made = target_of(recipe)
    assert made is not None
    planned = formula_and_values(recipe, made[0], made[1], [])
    assert planned is not None
    values = planned[1]
    nodes = int(values.get("trainer.num_nodes") or values.get("fabric.num_nodes") or 1)
    return (1 if "one_gpu" in path.parts else recipe_devices(values) or NODE * nodes), GPU


def cost_line(path: Path) -> str | None:
    """Return the line of a recipe; None where it is a base only."""
    recipe = load_recipe(str(path))
    made = target_of(recipe)
    if made is None:
        return None
    count, gpu = devices_of(recipe, path)
    plan = make_plan(recipe, made[0], made[1], [f"--gpus={count}", f"--gpu={gpu}"])
    assert plan is not None
    return f"{LINE} ({count} x {gpu}): {_numbers(plan)}" if plan.footprint.works else f"{LINE}: {_light(plan)}"


def _numbers(plan: Plan) -> str:
    made, device = plan.footprint, plan.device
    verdict = "" if not plan.advice else ", DOES NOT FIT"
    memory = f"{shown_bytes(made.peak_bytes)} of {shown_bytes(device.usable_bytes)} a GPU ({made.fullest.name})"
    disk = shown_bytes(sum(made.disk.values()))
    return f"{memory}{verdict}; {disk} of disk; {shown_seconds(total_seconds(made, device))}"


def _light(plan: Plan) -> str:
    made = plan.footprint
    return f"{shown_bytes(made.peak_bytes)} of memory, no GPU; {shown_bytes(sum(made.disk.values()))} of disk"


def with_line(text: str, line: str) -> str:
    """Return the text of a recipe with the line at the end of its header."""
    rows = text.split("\n")
    end = next((place for place, row in enumerate(rows) if not row.startswith("#")), len(rows))
    header = [TYPED.sub("", row) for row in rows[:end] if not row.startswith(LINE)]
    return "\n".join([*(row for row in header if row.strip() != "#"), line, *rows[end:]])


def recipes() -> list[Path]:
    """Return the recipes with a line."""
    return sorted(path for folder in FOLDERS for path in (ROOT / "recipes" / folder).rglob("*.yaml"))


def main(check: bool) -> int:
    """Write or check all lines; return the number of recipes that differ."""
    differing = 0
    for path in recipes():
        line = cost_line(path)
        text = path.read_text()
        new = text if line is None else with_line(text, line)
        if new != text:
            differing += 1
            print(f"{path.relative_to(ROOT)}: {line}")
            if not check:
                path.write_text(new)
    return differing


if __name__ == "__main__":
    found = main("--check" in sys.argv[1:])
    sys.exit(found if "--check" in sys.argv[1:] else 0)
