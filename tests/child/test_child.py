"""A child from a parent and a plan: its configuration, its shards, and plans that do not fit the parent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.released_twin import TWIN_BLOCKS, write_released_twin
from helpers.small_children import logits_of, save_plan
from transformers import GptOssConfig

from lit_puzzle.child.child import Child, generation_config
from lit_puzzle.child.manual_plan import manual_plan
from lit_puzzle.child.settings import ManualPlan
from lit_puzzle.model.checkpoint import Checkpoint, fingerprint
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig
from lit_puzzle.spec import Plan


def test_shards_of_a_child_load_in_transformers(tmp_path: Path, parent: Path) -> None:
    source = Checkpoint(parent)
    plan = Plan.load(save_plan(tmp_path, parent, [((0, 1, 5), 8), ((0, 2), None), ((1, 2), 4), ((0, 1, 2, 3), 16)]))
    for name, limit in (("one", 10**9), ("many", 40_000)):
        (tmp_path / name).mkdir()
        Child(source, plan).write(tmp_path / name, limit)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(tmp_path / "one"), logits_of(tmp_path / "many"))
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "many")


@pytest.mark.parametrize("dialect", ["rope_parameters", "rope_scaling"])
def test_rope_factor_moves_the_context_with_it(tmp_path: Path, parent: Path, dialect: str) -> None:
    source = parent if dialect == "rope_parameters" else write_released_twin(tmp_path / "twin")
    assert dialect in json.loads((source / "config.json").read_text())
    checkpoint = Checkpoint(source)
    (tmp_path / "child").mkdir()
    Child(checkpoint, manual_plan(checkpoint, ManualPlan()), rope_factor=48).write(tmp_path / "child")
    config = GptOssPuzzleConfig.from_pretrained(tmp_path / "child")
    assert config.max_position_embeddings == 4096 * 48
    assert config.rope_parameters["factor"] == 48.0
    before = GptOssPuzzleConfig.from_pretrained(source) if source != parent else GptOssConfig.from_pretrained(source)
    assert config.rope_parameters == before.rope_parameters | {"factor": 48.0}


@pytest.mark.parametrize(
    ("written", "model_stops", "vocabulary", "expected"),
    [
        ({"eos_token_id": [200002, 199999]}, 200002, 201088, [200002, 199999, 200012]),
        ({"eos_token_id": 200002}, 200002, 201088, [200002, 199999, 200012]),
        (None, 200002, 201088, [200002, 199999, 200012]),
        ({"eos_token_id": [5, 7]}, 2, 128, [5, 7, 2]),
        ({"eos_token_id": 2}, None, 128, [2]),
        ({}, None, 128, None),
    ],
)
def test_every_stop_token_is_listed_once(
    tmp_path: Path, written: dict[str, Any] | None, model_stops: int | None, vocabulary: int, expected: list[int] | None
) -> None:
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(written | {"do_sample": True}))
    config = {"model_type": "gpt_oss", "eos_token_id": model_stops, "vocab_size": vocabulary}
    settings = generation_config(tmp_path, config)
    assert settings["eos_token_id"] == expected
    assert settings.get("do_sample") == (True if written is not None else None)


def test_plan_of_another_parent_is_refused(tmp_path: Path, parent: Path) -> None:
    plan = save_plan(tmp_path, write_released_twin(tmp_path / "twin"), [((0,), None)] * 4)
    with pytest.raises(ValueError, match=r"the plan is of the parent .*expert indices would mean other experts"):
        Child(Checkpoint(parent), Plan.load(plan))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([((0, 1), 8)] * 3, "the plan has 3 layers, the parent 4"),
        ([((0, 1), 8), ((0, 1), 8), ((0, 1), None), ((0, 1), 8)], "layer 2 the window None, wider than the parent's 8"),
        ([((0, 1), 9)] * 4, "layer 0 the window 9, wider"),
    ],
)
def test_plan_that_does_not_fit_is_refused(tmp_path: Path, parent: Path, blocks: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Child(Checkpoint(parent), Plan.load(save_plan(tmp_path, parent, blocks)))


def test_plan_with_experts_a_puzzle_parent_lacks_is_refused(tmp_path: Path) -> None:
    twin = write_released_twin(tmp_path / "twin")
    blocks: list[tuple[tuple[int, ...], int | None]] = [((0, 4), b["sliding_window"]) for b in TWIN_BLOCKS]
    with pytest.raises(ValueError, match="keeps expert 4 of layer 3, which has 4"):
        Child(Checkpoint(twin), Plan.load(save_plan(tmp_path, twin, blocks)))
