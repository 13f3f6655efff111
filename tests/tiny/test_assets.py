"""The embedded models are those of their recipes: the child is a plan of the search, distilled with frozen experts."""

from fnmatch import fnmatchcase
from pathlib import Path

import torch
from transformers import AutoTokenizer

from lit_puzzle.child.assemble import assemble
from lit_puzzle.environments.environment import Environment
from lit_puzzle.evaluate.held_out import held_out_problems
from lit_puzzle.evaluate.solving import solve_problems
from lit_puzzle.evaluate.summary import summarize
from lit_puzzle.generation.load import load_engine
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import GPT_OSS
from lit_puzzle.model.layout import count_parameters
from lit_puzzle.run.recipe import load_recipe
from lit_puzzle.tiny.world import Chains, Counting, Sorting

ASSETS = Path(__file__).parents[2] / "lit_puzzle" / "assets"
WEIGHTS = "model.safetensors"


def test_the_child_is_its_plan_with_trained_tensors_changed(tmp_path):
    assemble(tmp_path, ASSETS / "tiny_parent", plan=ASSETS / "tiny_child" / "plan.json")
    names = {path.name for path in (ASSETS / "tiny_child").iterdir()}
    assert names == {path.name for path in (tmp_path / "child").iterdir()}
    for name in names - {WEIGHTS}:
        assert (tmp_path / "child" / name).read_bytes() == (ASSETS / "tiny_child" / name).read_bytes(), name
    pruned, distilled = Checkpoint(tmp_path / "child"), Checkpoint(ASSETS / "tiny_child")
    for name, info in pruned.tensors.items():
        frozen = any(fnmatchcase(name, pattern) for pattern in GPT_OSS.layer.frozen)
        assert distilled.tensors[name].dtype == info.dtype
        assert torch.equal(pruned.read(name), distilled.read(name)) == frozen, name


def test_child_is_within_the_budget_of_the_search():
    """At most 5% below the limit; all layers but layer 1 have windows."""
    child = Checkpoint(ASSETS / "tiny_child")
    limit = load_recipe("recipes/search.yaml").value("constraints")["limits"]["total_parameters"]
    assert 0.95 * limit < count_parameters(child.config) <= limit
    assert [window for _, window in child.blocks].count(None) == 1 and child.blocks[1][1] is None


def test_the_child_is_good_enough_and_leaves_room_for_recovery():
    environments: list[Environment] = [Chains(), Sorting(), Counting()]
    pairs = held_out_problems(environments, ["high"], 96, seed=5)
    engine = load_engine(EngineSettings("transformers"), ASSETS / "tiny_child")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_child")
    episodes = solve_problems(engine, tokenizer, pairs, environments, Sampling(96, temperature=0.0))
    assert 0.4 < summarize(episodes)["accuracy/high"] < 0.75
