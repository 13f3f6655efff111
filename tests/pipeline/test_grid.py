"""grid.py: every combination once, placeholders and overrides in their places, refusals; the table."""

from pathlib import Path

import pytest

from lit_puzzle.pipeline.grid import expanded
from lit_puzzle.pipeline.prepared import prepared
from lit_puzzle.pipeline.stages import read_stages
from lit_puzzle.run.recipe import load_recipe

ROOT = Path(__file__).parents[2]
ENTRY = {
    "recipe": "search.yaml",
    "name": "search-{plan}-{seed}",
    "each": {"plan": {"mip": None, "random": {"solver.name": "random", "solver.seed": "{seed}"}}, "seed": [0, 7]},
    "overrides": {"scores": "runs/score-{seed}", "solver.seed": 1, "objective": {"balance": "{seed}"}},
}


def test_every_combination_with_its_values() -> None:
    found = expanded(ENTRY, "here")
    assert [entry["name"] for entry in found] == [
        f"search-{plan}-{seed}" for plan in ("mip", "random") for seed in (0, 7)
    ]
    assert all(entry["recipe"] == "search.yaml" and "each" not in entry for entry in found)
    assert found[1]["overrides"] == {"scores": "runs/score-7", "solver.seed": 1, "objective": {"balance": 7}}
    assert found[3]["overrides"] == found[1]["overrides"] | {"solver.name": "random", "solver.seed": 7}
    assert expanded({"recipe": "a.yaml", "name": "{b}"}, "here") == [{"recipe": "a.yaml", "name": "{b}"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"each": {"seed": 3}}, "each is .*'seed': 3.*; a mapping of names to lists"),
        ({"each": {}}, "each is {}"),
        ({"each": {"seed": []}}, "lists that are not empty"),
        ({"each": {"seed": {"a": 3}}}, "mappings of overrides"),
        ({"each": {"seed": {"a": ["b"]}}}, "mappings of overrides"),
        ({"each": {1: [1]}, "name": "a-{1}"}, "a mapping of names to lists"),
        ({"name": "search-{plan}"}, r"name is 'search-\{plan\}'; it needs \{seed\}"),
        ({"overrides": {"scores": "runs/{method}"}}, r"names \{method\}; each has plan, seed"),
    ],
)
def test_wrong_grids_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        expanded(ENTRY | changes, "here")


def test_the_packaged_ablation_wires_seeds_to_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, _ = prepared(load_recipe("recipes/ablations.yaml"), [])
    stages = {stage.name: stage for stage in read_stages(Path("runs/ablations"), recipe.value("stages"), {})}
    assert len(stages) == 3 * 3 + 3 * 5 * 3
    assert stages["search-random-2"].reads == ("library-2", "score-2")
    assert {"--solver.name=random", "--solver.seed=2"} <= set(stages["search-random-2"].words)
    assert stages["evaluate-greedy-1"].reads == ("assemble-greedy-1",)
    assert "--objective.window_metric=null" in stages["search-windows_by_kl-0"].words
    unread = set(stages) - {read for stage in stages.values() for read in stage.reads}
    assert all(name.startswith("evaluate-") for name in unread)
