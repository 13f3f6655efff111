"""Several importance scores made into one: by hand, read by the library, refused where they do not belong together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lit_puzzle.importance.combine import Combination, GeometricMean, combine_importance
from lit_puzzle.importance.importance_file import Importance, scores_identity
from lit_puzzle.library.candidates import library
from lit_puzzle.library.library import Library
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.run.inputs import recorded_inputs, recorded_outputs

NAN = float("nan")
FIRST = [4.0, 1.0, 9.0, 0.0, 2.0, 3.0, 5.0, 7.0]
SECOND = [1.0, 16.0, 4.0, 5.0, NAN, 0.5, 0.25, 2.0]


def save(folder: Path, parent: Path, row: list[Any], method: str, tokens: int = 10, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    scores = tuple(torch.tensor(row, dtype=torch.float64) for _ in range(4))
    missing = tuple(place for place, value in enumerate(row) if value != value)
    listed = (missing,) * 4 if missing else ()
    values = {"fingerprint": fingerprint(parent), "not_measured": listed} | changes
    Importance(method=method, tokens=tokens, scores=scores, **values).save(folder)
    return folder


@pytest.fixture
def two(parent: Path, tmp_path: Path) -> list[Path]:
    return [
        save(tmp_path / "one", parent, FIRST, "leave_one_out", 12),
        save(tmp_path / "two", parent, SECOND, "kl", 10),
    ]


def combined(tmp_path: Path, parent: Path, folders: list[Path], method: Combination | None = None) -> Importance:
    (tmp_path / "run").mkdir(exist_ok=True)
    combine_importance(tmp_path / "run", parent, folders, method)
    return Importance.load(tmp_path / "run")


def test_geometric_mean_by_hand(parent, two, tmp_path):
    found = combined(tmp_path, parent, two)
    expected = [2.0, 4.0, 6.0, 0.0, NAN, 1.5**0.5, 1.25**0.5, 14**0.5]
    torch.testing.assert_close(found.scores[3], torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    assert (found.method, found.tokens) == ("geometric_mean(leave_one_out, kl)", 10)
    assert found.not_measured == ((4,),) * 4
    weighted = combined(tmp_path, parent, two, GeometricMean((3.0, 1.0)))
    assert float(weighted.scores[0][1]) == pytest.approx(2.0) and float(weighted.scores[0][0]) == pytest.approx(8**0.5)


def test_the_order_does_not_depend_on_units(parent, two, tmp_path):
    found = combined(tmp_path, parent, two).keep([5] * 4)
    save(two[1], parent, [value * 1e-6 for value in SECOND], "kl")
    (tmp_path / "again").mkdir()
    combine_importance(tmp_path / "again", parent, two)
    assert Importance.load(tmp_path / "again").keep([5] * 4) == found == ((0, 1, 2, 5, 7),) * 4


def test_the_library_reads_it_and_the_lineage_names_what_it_is_made_of(parent, two, tmp_path):
    combined(tmp_path, parent, two)
    inputs = recorded_inputs(tmp_path / "run")
    assert inputs["importances.0"].content == scores_identity(two[0]).content and "parent" in inputs
    assert inputs["importances.1"].content == scores_identity(two[1]).content
    assert recorded_outputs(tmp_path / "run")["importance"].content == scores_identity(tmp_path / "run").content
    (tmp_path / "library").mkdir()
    library(tmp_path / "library", parent, tmp_path / "run", [6, 7], [])
    candidates = Library.load(tmp_path / "library").layers[0]
    assert [candidate.block.experts for candidate in candidates[1:]] == [(0, 1, 2, 3, 5, 6, 7), (0, 1, 2, 5, 6, 7)]


@dataclass(frozen=True)
class Smaller:
    """A rule of the user: the smaller of all scores."""

    name: ClassVar[str] = "smaller"

    def combine(self, scores_ME: Tensor) -> Tensor:
        return scores_ME.amin(dim=0)


@dataclass(frozen=True)
class Broken:
    name: ClassVar[str] = "broken"
    factor: float = NAN

    def combine(self, scores_ME: Tensor) -> Tensor:
        return scores_ME[0] * self.factor if self.factor else scores_ME[0, :3]


def test_a_rule_of_the_user(parent, two, tmp_path):
    found = combined(tmp_path, parent, two, Smaller())
    assert found.scores[0].tolist()[:4] == [1.0, 1.0, 4.0, 0.0] and found.method.startswith("smaller(")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Broken(), "broken returned NaN for experts of layer 0 that all scores know"),
        (Broken(0.0), r"broken returned torch.float64 of shape \(3,\) for layer 0; 8 float64 numbers are needed"),
        (Broken(-1.0), "layer 0 are not all finite and at least 0"),
        (GeometricMean((1.0, 2.0, 3.0)), "3 weights were given for 2 importance scores"),
    ],
)
def test_a_rule_that_returns_something_else_is_refused(parent, two, tmp_path, method, message):
    with pytest.raises(ValueError, match=message):
        combined(tmp_path, parent, two, method)


def test_scores_that_do_not_belong_together_are_refused(parent, two, tmp_path):
    with pytest.raises(ValueError, match="two or more different folders"):
        combined(tmp_path, parent, two[:1])
    with pytest.raises(ValueError, match="two or more different folders"):
        combined(tmp_path, parent, [two[0], two[0]])
    with pytest.raises(ValueError, match="weights must be 1e-9 to 1e9"):
        GeometricMean((1.0, 0.0))
    other = save(tmp_path / "other", parent, FIRST, "other", fingerprint="another")
    with pytest.raises(ValueError, match=r"other: The importance scores are of parent another"):
        combined(tmp_path, parent, [two[0], other])
    unlisted = save(tmp_path / "unlisted", parent, SECOND, "nan", not_measured=())
    with pytest.raises(ValueError, match=r"unlisted: the importance scores of layer 0 are not all finite .* \[\]"):
        combined(tmp_path, parent, [two[0], unlisted])
    assert not (tmp_path / "run" / "importance.json").exists()


def test_every_expert_of_the_parent_needs_one_score(parent, two, tmp_path):
    for row, shapes in ((FIRST[:5], r"\[\[5\], "), ([[score] for score in FIRST], r"\[\[8, 1\], ")):
        wrong = save(tmp_path / f"wrong{len(row)}", parent, row, "reap", not_measured=())
        with pytest.raises(ValueError, match=rf"have the shapes {shapes}.*; the parent's layers have \[8, 8, 8, 8\]"):
            combine_importance(tmp_path / "run", parent, [two[0], wrong])
        with pytest.raises(ValueError, match="have the shapes"):
            library(tmp_path / "library", parent, two[0], [4], [], {"reap": wrong})
    unknown = save(tmp_path / "unknown", parent, [NAN] * 8, "kl")
    with pytest.raises(ValueError, match=r"no score for any expert of layers \[0, 1, 2, 3\]"):
        library(tmp_path / "library", parent, unknown, [4], [])


def test_one_folder_twice_and_no_weights_are_refused(parent, two, tmp_path):
    again = two[0].parent / "other" / ".." / two[0].name
    (two[0].parent / "other").mkdir()
    with pytest.raises(ValueError, match="two or more different folders"):
        combine_importance(tmp_path / "run", parent, [two[0], again])
    with pytest.raises(ValueError, match="0 weights were given for 2"):
        combine_importance(tmp_path / "run", parent, two, GeometricMean(weights=()))
