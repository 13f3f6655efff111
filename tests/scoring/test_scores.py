"""The file of scores: it comes back bit for bit, means have their standard errors, other forms are refused by name."""

import json
import math
from typing import Any

import pytest

from lit_puzzle.library.library import Candidate, Library, candidate_name, parent_blocks
from lit_puzzle.scoring.scores import Measurement, Scores, measure
from lit_puzzle.spec import BlockSpec

GOOD = Scores(
    "print",
    3,
    50,
    {
        (0, "experts=4"): {"kl": Measurement(0.1, 1 / 3), "hidden_mse": Measurement(1e-300, 0.0)},
        (2, "window=16"): {"kl": Measurement(0.25, 0.5)},
    },
    parent={"far/tokens/low": 5.5},
)


def test_it_comes_back_from_folder_or_file(tmp_path):
    GOOD.save(tmp_path)
    assert Scores.load(tmp_path) == GOOD == Scores.load(tmp_path / "scores.json")
    first = json.loads((tmp_path / "scores.json").read_text())["entries"][0]
    assert first["layer"] == 0 and first["candidate"] == "experts=4"
    assert first["metrics"]["kl"] == {"mean": 0.1, "standard_error": 1 / 3}


def test_mean_and_standard_error():
    # 1, 2, 6: mean 3, deviations 4 + 1 + 9 = 14, variance 7, error sqrt(7 / 3)
    assert measure([1.0, 2.0, 6.0]) == Measurement(3.0, math.sqrt(7 / 3))
    with pytest.raises(ValueError, match="1 samples were scored; a standard error needs two"):
        measure([1.0])


def test_scores_of_another_parent_are_refused():
    GOOD.check_parent("print")
    with pytest.raises(ValueError, match="of parent print, not of other"):
        GOOD.check_parent("other")


def two_layers() -> Library:
    """8 experts, a window of 32 and then full attention; 4 experts, a window of 16, and both in either layer."""
    config = {
        "model_type": "gpt_oss",
        "num_hidden_layers": 2,
        "num_local_experts": 8,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    layers = []
    for own in parent_blocks(config):
        blocks = [own, BlockSpec((0, 1, 2, 3), own.window_tokens), BlockSpec((0, 1, 2, 3), 16)]
        layers.append(tuple(Candidate(candidate_name(own, block), block) for block in blocks))
    return Library("print", 8, config, tuple(layers))


def test_scores_of_unknown_candidates_are_refused_by_name():
    library, of_kl = two_layers(), {"kl": Measurement(0.5)}
    names = ["parent", "experts=4", "window=16", "experts=4,window=16"]  # window=16: a half, no candidate of its own
    assert [candidate.name for candidate in library.layers[1]] == ["parent", "experts=4", "experts=4,window=16"]
    Scores("print", 0, 0, {(layer, name): of_kl for layer in (0, 1) for name in names}).check_library(library)
    refused = {
        (1, "window=16,experts=4"): r"1 entries .*\(1, 'window=16,experts=4'\).*layer 1 allows .*experts=4,window=16",
        (0, "experts=5"): r"\(0, 'experts=5'\)",
        (99, "experts=4"): r"entries of layers \[99\]; the library's are 0 to 1",
    }
    for key, message in refused.items():
        with pytest.raises(ValueError, match=message):
            Scores("print", 0, 0, {(0, "experts=4"): of_kl, key: of_kl}).check_library(library)
    with pytest.raises(ValueError, match="of parent other, not of print"):
        Scores("other", 0, 0, {(0, "experts=4"): of_kl}).check_library(library)


def test_the_smallest_file_of_a_user(tmp_path):
    entry = {"layer": 0, "candidate": "experts=8", "metrics": {"kl": {"mean": 0.1}}}
    (tmp_path / "mine.json").write_text(json.dumps({"parent_fingerprint": "print", "entries": [entry]}))
    assert Scores.load(tmp_path / "mine.json") == Scores("print", 0, 0, {(0, "experts=8"): {"kl": Measurement(0.1, 0)}})


def change(path: list[Any], value: object) -> dict[str, Any]:
    data = GOOD.to_json()
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (change(["extra"], 1), r"scores: unknown key\(s\) \['extra'\]"),
        (change(["samples"], -1), "samples must be a whole number"),
        (change(["parent_fingerprint"], None), "parent_fingerprint must be a text"),
        (change(["entries", 0, "layer"], 1.5), "layer must be a whole number"),
        (change(["entries", 0, "extra"], 1), r"an entry: unknown key\(s\) \['extra'\]"),
        (
            change(["entries", 0, "metrics", "kl"], 0.5),
            "layer 0, candidate 'experts=4', kl: expected a JSON object",
        ),
        (change(["entries", 0, "metrics", "kl", "mean"], "0.5"), "must be numbers"),
        (change(["entries", 0, "metrics", "kl", "mean"], -0.5), "kl: mean must be at least 0, as kl is, got -0.5"),
        (change(["entries", 0, "metrics", "kl", "standard_error"], -0.5), "kl: standard_error must be at least 0"),
        (change(["entries", 1], GOOD.to_json()["entries"][0]), "layer 0, candidate 'experts=4' comes twice"),
        ([], "must hold a JSON object, got list"),
    ],
)
def test_other_forms_are_refused(tmp_path, data, message):
    (tmp_path / "scores.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        Scores.load(tmp_path)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no scores.json. Make it with: lightning run recipes/score.yaml"):
        Scores.load(tmp_path)
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(ValueError, match=r"scores\.json is not JSON"):
        Scores.load(tmp_path)
