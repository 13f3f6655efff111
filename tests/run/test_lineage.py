"""Lineage: runs are ancestors by what they recorded, wherever their folders and inputs lie now."""

import json
from pathlib import Path

import pytest

from lit_puzzle.run.identity import Identity
from lit_puzzle.run.inputs import claim_inputs, record_output
from lit_puzzle.run.lineage import ancestors, check_ancestors, check_made_with, training_runs


def weights(path: object, name: str) -> Identity:
    """The identity of a checkpoint as an input, with more parts than an output records."""
    return Identity(str(path), {"weights": name * 64, "tokenizer": "0" * 64})


def made_run(folder: Path, parent: Identity, child: str) -> Path:
    claim_inputs(folder, {"child": parent})
    record_output(folder, "child", Identity(str(folder / "child"), {"weights": child * 64}))
    return folder


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Three runs, each trained on the child of the one before: a -> b -> c -> d."""
    first = made_run(tmp_path / "assemble", weights("parent", "a"), "b")
    second = made_run(tmp_path / "distill", weights(first / "child", "b"), "c")
    return [first, second, made_run(tmp_path / "rl", weights(second / "child", "c"), "d")]


def test_ancestors_are_followed_through_the_recorded_paths(chain: list[Path]) -> None:
    found = ancestors(weights(chain[2] / "child", "d"))
    assert [step.folder.name for step in found] == ["rl", "distill", "assemble"]
    assert [step.folder.name for step in ancestors(weights(chain[1] / "child", "c"))] == ["distill", "assemble"]


def test_moved_runs_are_found_by_name(chain: list[Path], tmp_path: Path) -> None:
    moved = [folder.rename(tmp_path / f"moved_{folder.name}") for folder in chain]
    copied = weights(tmp_path / "elsewhere", "d")
    assert ancestors(copied) == []
    assert [step.folder for step in ancestors(copied, moved)] == moved[::-1]
    check_ancestors(copied, moved, "card.training")


def test_a_path_whose_content_has_changed_leads_nowhere(chain: list[Path]) -> None:
    record_output(chain[1], "child", Identity("x", {"weights": "e" * 64}))  # distilled again after the recovery
    assert [step.folder.name for step in ancestors(weights(chain[2] / "child", "d"))] == ["rl"]
    with pytest.raises(ValueError, match=r"card names .*distill, but .*weights dddddddddddd\) did not come from"):
        check_ancestors(weights(chain[2] / "child", "d"), chain[1:], "card")


def test_a_run_without_a_record_is_no_ancestor(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text(json.dumps({"results": {}}))
    with pytest.raises(ValueError, match="it has no record of what it made"):
        check_ancestors(weights("x", "a"), [tmp_path / "old" / "run.json"], "card")


def test_results_are_paired_with_the_input_that_they_were_made_with(chain: list[Path], tmp_path: Path) -> None:
    made = chain[1] / "child" / "plan.json"
    check_made_with(made, "child", weights("moved", "b"), "Name it.")
    check_made_with(made, "no such input", weights("moved", "e"), "Name it.")
    check_made_with(tmp_path / "by_hand.json", "child", weights("moved", "e"), "Name it.")
    with pytest.raises(ValueError, match=r"plan\.json was made with another child: .*distill had .*Name it\."):
        check_made_with(made, "child", weights("moved", "e"), "Name it.")


def trained(folder: Path, inputs: dict[str, Identity], made: str, command: str = "fit") -> Identity:
    claim_inputs(folder, inputs)
    record_output(folder, "child", Identity(str(folder / "child"), {"weights": made * 64}))
    (folder / "config.yaml").write_text(f"command: {command}\n")
    return weights(folder / "child", made)


def test_training_is_read_from_the_runs_that_the_weights_went_through(tmp_path: Path) -> None:
    teacher = trained(tmp_path / "teacher", {"child": weights("a stock model", "t")}, "u")
    library = trained(tmp_path / "blocks", {"parent": weights("parent", "a")}, "l")
    parent = {"parent": weights("parent", "a"), "library": library}
    assembled = trained(tmp_path / "assemble", parent, "b", "assemble")
    distilled = trained(tmp_path / "distill", {"child": assembled, "parent": teacher}, "c")
    other = trained(tmp_path / "other_rl", {"child": distilled}, "o")
    recovered = trained(tmp_path / "rl", {"child": distilled}, "d")
    names = [folder.name for folder in training_runs(recovered)]
    assert names == ["blocks", "distill", "rl"]  # neither the teacher's nor the other recovery
    assert [folder.name for folder in training_runs(other)] == ["blocks", "distill", "other_rl"]
    assert training_runs(assembled) == [tmp_path / "blocks"]
    assert training_runs(weights(tmp_path / "rl" / "child", "x")) == []  # these weights are not what the run made
