"""The table of scores: hand-computed ranks and paired drops; finished files and the rows that a library needs."""

import math

import pytest

from lit_puzzle.library.library import Candidate, Library
from lit_puzzle.scoring.score_files import Entry, ScoreFiles, check_finite, entries_of
from lit_puzzle.scoring.score_table import parent_means, ranks_by_sample, score_table
from lit_puzzle.scoring.scores import Measurement
from lit_puzzle.spec import BlockSpec

ALL = (0, 1, 2, 3)
CONFIG = {"model_type": "gpt_oss", "num_hidden_layers": 1, "num_local_experts": 4, "layer_types": ["full_attention"]}


def library(weights: str | None = None) -> Library:
    blocks = {"experts=2": BlockSpec((1, 3), None), "window=8": BlockSpec(ALL, 8)}
    blocks |= {"experts=1,window=8": BlockSpec((1,), 8)}
    parent = Candidate("parent", BlockSpec(ALL, None))
    named = [Candidate(name, block, weights if "," in name else None) for name, block in blocks.items()]
    return Library("print", 4, CONFIG, ((parent, *named),))


def test_halves_are_scored_once_and_by_themselves():
    found = entries_of(library(), pairs=False)
    assert [(entry.name, entry.kind, entry.candidate) for entry in found] == [
        ("experts=2", "experts", "experts=2"),
        ("window=8", "window", "window=8"),
        ("experts=1", "experts", None),
    ]
    assert found[2].block == BlockSpec((1,), None)
    with pytest.raises(ValueError, match=r"'experts=1,window=8' has trained tensors .* --scoring.pairs=true"):
        entries_of(library("w.safetensors"), pairs=False)


def test_pairs_are_the_candidates_as_they_are():
    found = entries_of(library("w.safetensors"), pairs=True)
    assert [(entry.name, entry.candidate) for entry in found] == [
        (candidate.name, candidate.name) for candidate in library().layers[0][1:]
    ]
    assert {entry.kind for entry in found} == {"pair"} and found[2].block == BlockSpec((1,), 8)


def test_ranks_within_each_sample():
    losses = [[0.5, 9.0, 2.0], [0.1, 9.0, 3.0], [0.9, 9.0, 1.0], [0.2, 1.0, 3.0]]
    assert ranks_by_sample(losses, [0, 1]) == [[0.75, 0.75], [0.25, 0.75], [1.0, 0.75], [0.5, 0.25]]
    assert ranks_by_sample(losses, [2]) == [[0.5], [0.875], [0.25], [0.875]]


def test_a_table_by_hand(tmp_path):
    files, evaluated = ScoreFiles(tmp_path / "candidates"), ScoreFiles(tmp_path / "evaluated")
    entries = entries_of(library(), pairs=False)
    for entry, values in zip(entries, ([1.0, 3.0], [7.0, 7.0], [2.0, 2.0]), strict=True):
        files.write(entry.file_name, {"hidden_mse": values})
    evaluated.write("parent.json", {"score": [1.0, 1.0, 0.0, 1.0], "tokens/low": [5.0, 6.0], "cut/low": [0.0, 1.0]})
    evaluated.write(
        entries[1].file_name, {"score": [0.0, 1.0, 1.0, 0.0], "tokens/low": [8.0, 5.0], "cut/low": [0.0, 0.0]}
    )
    evaluations = {"far": (evaluated, [entries[1]])}
    table = score_table(files, entries, [0, 1], evaluations, "parent.json")
    assert table[0, "window=8"]["far/tokens/low"] == Measurement(1.0, 2.0)  # 3 tokens longer, 1 shorter
    assert table[0, "window=8"]["far/cut/low"] == Measurement(-0.5, 0.5)
    assert parent_means(evaluations, "parent.json") == {"far": 0.75, "far/tokens/low": 5.5, "far/cut/low": 0.5}
    assert parent_means({"far": (evaluated, [])}, "parent.json") == {}
    assert table[0, "experts=2"] == {"hidden_mse": Measurement(2.0, 1.0), "mean_rank": Measurement(0.75, 0.25)}
    assert table[0, "experts=1"] == {"hidden_mse": Measurement(2.0, 0.0), "mean_rank": Measurement(0.75, 0.25)}
    # drops 1, 0, -1, 1: mean 1/4, squared deviations 9/16 + 1/16 + 25/16 + 9/16 = 44/16, over 3 x 4
    far = table[0, "window=8"]["far"]
    assert far.mean == 0.25 and far.standard_error == pytest.approx(math.sqrt(44 / 16 / 12))
    assert table[0, "window=8"]["mean_rank"] == Measurement(1.0, 0.0)  # alone of its kind


def test_finished_files_come_back_bit_for_bit(tmp_path):
    files = ScoreFiles(tmp_path / "deep" / "candidates")
    assert not files.has("a.json")
    values = {"kl": [0.1, 1 / 3, 5e-324], "js": [1e300]}
    files.write("a.json", values)
    assert files.has("a.json") and files.read(["a.json"]) == [values]
    assert Entry(3, "window=8", "window", BlockSpec(ALL, 8), None).file_name == "layer=3,window=8.json"


def test_values_that_are_not_finite_are_named():
    check_finite("layer 1", {"kl": [0.0, 1.0]})
    for broken in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"layer 1, candidate 'x': kl of sample 1 is {broken}"):
            check_finite("layer 1, candidate 'x'", {"js": [0.0], "kl": [0.0, broken]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"b\.json is not JSON: .* Remove it; the same command scores this candidate again"),
        ("{}", r"b\.json is damaged: it must have a list of numbers"),
        ('{"kl": "x", "js": [1, 2]}', r"b\.json is damaged: it must have a list of numbers"),
        ('{"kl": [1, 2]}', r"b\.json has \{'kl': 2\} values, a\.json beside it has \{'kl': 2, 'js': 2\}"),
        ('{"kl": [1], "js": [1]}', r"b\.json has \{'kl': 1, 'js': 1\} values"),
    ],
)
def test_damaged_file_of_a_finished_candidate_is_refused_by_name(tmp_path, text, message):
    files = ScoreFiles(tmp_path)
    files.write("a.json", {"kl": [0.1, 0.2], "js": [0.0, 0.3]})
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        files.read(["a.json", "b.json"])
