"""Numbers in the headers of real recipes are those of `--plan`, and there are no others of memory or time."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
COMPUTED = re.compile(r"\d[\d.,]* ?(GB|GiB|TB|TiB|hours?|days?) ?(a GPU|per GPU|of disk|of memory|an update)")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_headers", ROOT / "scripts" / "recipe_headers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HEADERS = script()


@pytest.mark.parametrize("path", HEADERS.recipes(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_line_of_costs_is_what_the_plan_says(path: Path) -> None:
    line = HEADERS.cost_line(path)
    header = [row for row in path.read_text().split("\n") if row.startswith("#")]
    found = [row for row in header if row.startswith(HEADERS.LINE)]
    assert found == ([] if line is None else [line]), "run python scripts/recipe_headers.py"
    assert "DOES NOT FIT" not in (line or ""), "the devices that the header names are too small"
    others = [row for row in header if row not in found and COMPUTED.search(row)]
    assert others == [], "numbers that nobody computes: leave them to the line of costs"


def test_the_line_replaces_an_older_one_and_one_that_was_typed() -> None:
    text = "# What it is. Cost: lightning run recipes/a.yaml --plan\n# Cost (1 x H100): 3\nbase: b.yaml\n# a comment\n"
    assert HEADERS.with_line(text, "# Cost (8 x H100): 4") == (
        "# What it is.\n# Cost (8 x H100): 4\nbase: b.yaml\n# a comment\n"
    )
