"""The library: it is read as it was written, and candidates that do not fit the parent are refused."""

import json
from dataclasses import replace

import pytest

from lit_puzzle.library.library import Candidate, Library, candidate_name, parts
from lit_puzzle.spec import BlockSpec, Plan

CONFIG = {"model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": 4, "sliding_window": 8}
ALL = (0, 1, 2, 3)


def make() -> Library:
    windowed = (Candidate("parent", BlockSpec(ALL, 8)), Candidate("experts=2", BlockSpec((1, 3), 8)))
    full = (
        Candidate("parent", BlockSpec(ALL, None)),
        Candidate("experts=2", BlockSpec((0, 1), None), "layer1.safetensors"),
        Candidate("window=16", BlockSpec(ALL, 16)),
        Candidate("experts=2,window=16", BlockSpec((0, 1), 16)),
    )
    return Library("print", 4, CONFIG, (windowed, full))


def test_it_comes_back_from_its_folder(tmp_path):
    (tmp_path / "layer1.safetensors").touch()
    library = make()
    library.save(tmp_path)
    assert Library.load(tmp_path) == library
    (tmp_path / "layer1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'layer1.safetensors' of candidate 'experts=2' of layer 1 are not there"):
        Library.load(tmp_path)
    with pytest.raises(ValueError, match="are not there"):
        library.save(tmp_path)


def test_names_say_what_differs():
    own = BlockSpec(ALL, None)
    assert candidate_name(own, own) == "parent"
    assert candidate_name(own, BlockSpec((1,), 4)) == "experts=1,window=4"
    found = [parts(candidate) for candidate in make().layers[1]]
    assert found == [(None, None), ("experts=2", None), (None, "window=16"), ("experts=2", "window=16")]


def test_a_choice_is_a_plan():
    plan = make().plan(["parent", "experts=2,window=16"])
    assert plan == Plan("print", 4, (BlockSpec(ALL, 8), BlockSpec((0, 1), 16)))
    with pytest.raises(ValueError, match=r"layer 0 has no candidate 'window=16'; it has \['parent', 'experts=2'\]"):
        make().plan(["window=16", "parent"])
    with pytest.raises(ValueError, match="1 candidates were chosen for 2 layers"):
        make().plan(["parent"])


@pytest.mark.parametrize(
    ("layer", "candidates", "message"),
    [
        (0, [Candidate("experts=2", BlockSpec((1, 3), 8))], "must be the parent's own block"),
        (0, [Candidate("parent", BlockSpec(ALL, 8), "w.safetensors")], "must be the parent's own block"),
        (1, [Candidate("experts=3", BlockSpec((0, 1), None))], "its block is 'experts=2'"),
        (1, [Candidate("experts=2", BlockSpec((0, 4), None))], "keeps expert 4; the parent's layer has 4"),
        (0, [Candidate("window=16", BlockSpec(ALL, 16))], "wider window than the parent's 8"),
        (0, [Candidate("window=None", BlockSpec(ALL, None))], "wider window than the parent's 8"),
        (1, [Candidate("window=16", BlockSpec(ALL, 16))] * 2, "names must differ"),
        (1, [Candidate("window=4@reap", BlockSpec(ALL, 4))], "its block is 'window=4'"),
        (1, [Candidate("experts=2@a,b", BlockSpec((0, 1), None))], "its block is 'experts=2'"),
        (
            1,
            [Candidate("experts=1", BlockSpec((0,), None)), Candidate("experts=1@reap", BlockSpec((0,), None))],
            "keeps the same experts as a candidate of another origin",
        ),
        (
            1,
            [Candidate("experts=1@a", BlockSpec((0,), None)), Candidate("experts=1@a,window=4", BlockSpec((1,), 4))],
            "keeps other experts",
        ),
        (
            1,
            [Candidate("experts=1", BlockSpec((0,), None)), Candidate("experts=1,window=4", BlockSpec((1,), 4))],
            "keeps other experts",
        ),
        (1, [Candidate("window=4", BlockSpec(ALL, 4), "../w.safetensors")], "must name a file in the library's folder"),
    ],
)
def test_candidates_that_do_not_fit_are_refused(layer, candidates, message):
    layers = list(make().layers)
    own = () if candidates[0].name == "parent" or "own block" in message else layers[layer][:1]
    layers[layer] = (*own, *candidates)
    with pytest.raises(ValueError, match=message):
        replace(make(), layers=tuple(layers))


def test_other_parents_and_sizes_are_refused():
    make().check_parent("print")
    with pytest.raises(ValueError, match="of parent print, not of other"):
        make().check_parent("other")
    with pytest.raises(ValueError, match="num_parent_experts is 5, the parent's config says 4"):
        replace(make(), num_parent_experts=5)
    with pytest.raises(ValueError, match="candidates of 1 layers are given; the parent has 2"):
        replace(make(), layers=make().layers[:1])


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no library.json. Make it with: lightning run recipes/library.yaml"):
        Library.load(tmp_path)
    good = make().to_json()
    broken = {
        "not JSON": "{",
        "unknown key": json.dumps(good | {"extra": 1}),
        "missing key": json.dumps({key: value for key, value in good.items() if key != "config"}),
        "missing key in a candidate": json.dumps(good | {"layers": [[{"name": "parent"}], []]}),
        "no lists": json.dumps(good | {"layers": {}}),
    }
    for text in broken.values():
        (tmp_path / "library.json").write_text(text)
        with pytest.raises(ValueError, match=r"library\.json(: | is not JSON)"):
            Library.load(tmp_path)
