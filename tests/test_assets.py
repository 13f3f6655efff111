"""The embedded models are what their recipes say: the child is the parent, pruned and windowed, and nothing else."""

from pathlib import Path

from lit_puzzle.evaluate.accuracy import answer_problems, held_out_problems, load_policy, summarise
from lit_puzzle.recipe import load_recipe
from lit_puzzle.search.assemble import assemble
from lit_puzzle.spec import Plan
from lit_puzzle.tiny.world import Chains, Counting, Sorting

ASSETS = Path(__file__).parent.parent / "lit_puzzle" / "assets"


def test_child_is_the_pruned_parent_byte_for_byte(tmp_path):
    assemble(tmp_path, ASSETS / "tiny_parent", plan=ASSETS / "tiny_child" / "plan.json")
    names = {path.name for path in (ASSETS / "tiny_child").iterdir()}
    assert names == {path.name for path in (tmp_path / "child").iterdir()}
    for name in names:
        assert (tmp_path / "child" / name).read_bytes() == (ASSETS / "tiny_child" / name).read_bytes(), name


def test_plan_is_the_recipes():
    recipe, plan = load_recipe("recipes/assemble.yaml"), Plan.load(ASSETS / "tiny_child" / "plan.json")
    assert {len(block.experts) for block in plan.blocks} == {recipe.value("experts")}
    assert {3: plan.blocks[3].window_tokens} == recipe.value("windows")


def test_child_leaves_recovery_something_to_do():
    environments = [Chains(), Sorting(), Counting()]
    asked = held_out_problems(environments, ["high"], 96, seed=5)
    policy, tokenizer = load_policy(ASSETS / "tiny_child", "float32")
    accuracy = summarise(answer_problems(policy, tokenizer, asked, environments, 96, 96))["accuracy/high"]
    assert 0.4 < accuracy < 0.7
