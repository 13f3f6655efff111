"""From importance to candidates: the best-scored experts are kept, windows only narrow, other numbers are refused."""

from pathlib import Path

import pytest
import torch

from lit_puzzle.importance.importance_file import Importance, scores_identity
from lit_puzzle.library.candidates import library
from lit_puzzle.library.footprint import planned_candidates
from lit_puzzle.library.library import Library
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.model.footprint import model_size
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig, GptOssPuzzleForCausalLM
from lit_puzzle.run.inputs import recorded_inputs
from lit_puzzle.spec import BlockSpec


def save_importance(folder: Path, parent: Path, scores: list[list[float]]) -> Path:
    folder.mkdir(exist_ok=True)
    Importance(fingerprint(parent), "hand", 1, tuple(torch.tensor(row) for row in scores)).save(folder)
    return folder


@pytest.fixture
def parent(tmp_path, tiny_model) -> Path:
    tiny_model.save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


@pytest.fixture
def importance(tmp_path, parent) -> Path:
    rows = [[float((3 * expert + layer) % 8) for expert in range(8)] for layer in range(4)]
    return save_importance(tmp_path / "importance", parent, rows)


def test_every_layer_gets_counts_windows_and_their_combinations(tmp_path, parent, importance):
    results = library(tmp_path, parent, importance, experts=[2, 8, 5], windows=[4, 8, 16])
    made = Library.load(tmp_path)
    assert made.parent_fingerprint == fingerprint(parent) and made.num_parent_experts == 8
    narrow = ["parent", "experts=5", "experts=2", "window=4", "experts=5,window=4", "experts=2,window=4"]
    assert [candidate.name for candidate in made.layers[0]] == narrow  # 8 experts and the window 8 are its own
    full = [candidate.name for candidate in made.layers[1]]
    assert len(full) == 12 and full[3] == "window=16" and "experts=5,window=8" in full
    # scores of layer 1: 1 4 7 2 5 0 3 6 -> the five best are experts 2, 7, 4, 1, 6
    assert made.candidate(1, "experts=5,window=8").block == BlockSpec((1, 2, 4, 6, 7), 8)
    assert made.candidate(1, "experts=2").block == BlockSpec((2, 7), None)
    assert results["candidates"] == 2 * 6 + 2 * 12 and results["candidates_per_layer/max"] == 12
    assert results["log10_children"] == pytest.approx(2 * 0.7781512504 + 2 * 1.0791812460)


def test_layers_with_fewer_experts_get_what_fits_them(tmp_path, tiny_config):
    blocks = [{"num_local_experts": n, "sliding_window": None if n % 2 else 8} for n in (8, 3, 2, 1)]
    child = GptOssPuzzleForCausalLM(GptOssPuzzleConfig.from_parent(tiny_config(), blocks))
    child.save_pretrained(tmp_path / "child")
    rows = [[float(i) for i in range(n)] for n in (8, 3, 2, 1)]
    library(
        tmp_path, tmp_path / "child", save_importance(tmp_path / "importance", tmp_path / "child", rows), [2, 4], []
    )
    names = [[candidate.name for candidate in layer] for layer in Library.load(tmp_path).layers]
    assert names == [["parent", "experts=4", "experts=2"], ["parent", "experts=2"], ["parent"], ["parent"]]


@pytest.mark.parametrize(
    ("experts", "windows", "message"),
    [
        ([9], [], "experts \\[9\\] cannot be kept: no layer of the parent has more than 8"),
        ([0], [], "experts must be different numbers of at least 1"),
        ([4, 4], [], "experts must be different numbers"),
        ([4], [1], "windows must be different numbers of at least 2"),
        ([], [], "neither experts nor windows"),
    ],
)
def test_numbers_that_fit_nowhere_are_refused(tmp_path, parent, importance, experts, windows, message):
    with pytest.raises(ValueError, match=message):
        library(tmp_path, parent, importance, experts, windows)


def test_importance_of_another_parent_or_of_nan_is_refused(tmp_path, parent, importance, tiny_model):
    tiny_model.model.norm.weight.data[0] += 1
    tiny_model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="The importance scores are of parent"):
        library(tmp_path, tmp_path / "other", importance, [4], [])
    save_importance(importance, parent, [[-1.0] * 8] * 4)
    with pytest.raises(ValueError, match="importance scores of layer 0 are not all finite and at least 0"):
        library(tmp_path, parent, importance, [4], [])
    save_importance(importance, parent, [[float("nan")] * 8] * 4)
    with pytest.raises(ValueError, match="importance scores of layer 0 are not all finite"):
        library(tmp_path, parent, importance, [4], [])
    with pytest.raises(ValueError, match=r"expert importance .* does not exist"):
        library(tmp_path, parent, tmp_path / "nowhere", [4], [])
    assert not (tmp_path / "library.json").exists()


def test_sets_of_other_importances_stand_beside_named_by_their_origin(tmp_path, parent, importance):
    """Layer 0: the first keeps 5, 2, 7, 4, 1; `low` its opposite; `again` nothing new."""
    opposite = [[7.0 - (3 * expert + layer) % 8 for expert in range(8)] for layer in range(4)]
    low = save_importance(tmp_path / "low", parent, opposite)
    beside = {"low": low, "again": importance}
    library(tmp_path, parent, importance, experts=[2, 5], windows=[4], beside=beside)
    made = Library.load(tmp_path)
    sets = ["experts=5", "experts=5@low", "experts=2", "experts=2@low"]
    assert [candidate.name for candidate in made.layers[0]] == [
        "parent",
        *sets,
        "window=4",
        *(f"{name},window=4" for name in sets),
    ]
    first, other = (made.candidate(0, f"{name},window=4").block for name in ("experts=2", "experts=2@low"))
    assert (first, other) == (BlockSpec((2, 5), 4), BlockSpec((0, 3), 4))
    inputs = recorded_inputs(tmp_path)
    assert inputs["beside.low"].content == scores_identity(low).content != inputs["importance"].content
    assert planned_candidates(tmp_path, model_size(made.config)).experts[0] == (2, 2, 5, 5)


def test_origins_and_importances_beside_are_checked(tmp_path, parent, importance):
    with pytest.raises(ValueError, match=r"origins are lower-case letters, .* got \['REAP,'\]"):
        library(tmp_path, parent, importance, [2], [], beside={"REAP,": importance})
    wrong = save_importance(tmp_path / "wrong", parent, [[float("nan")] * 8] * 4)
    with pytest.raises(ValueError, match="not all finite"):
        library(tmp_path, parent, importance, [2], [], beside={"wrong": wrong})
