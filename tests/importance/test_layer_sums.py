"""Importance of a parent that is read layer by layer: the bits of the resident pass, resumed and refused."""

import json

import pytest
from helpers.importance_runs import run_importance
from helpers.released_twin import write_released_twin
from helpers.streamed_runs import ENOUGH_GIB, Killed, layers_run, same_files, stop_at

FILES = ("importance.json", "importance.safetensors")


@pytest.mark.parametrize("attention", ["eager", "sink_attention"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_scores_are_the_resident_ones_bit_for_bit(parent, sequences, tmp_path, dtype, attention):
    how = {"dtype": dtype, "attn_implementation": attention, "chunk_tokens": 20}
    resident = run_importance(tmp_path / "resident", parent, sequences, **how)
    streamed = run_importance(tmp_path / "streamed", parent, sequences, memory_gib=ENOUGH_GIB, **how)
    assert all(same_files(tmp_path / "resident" / name, tmp_path / "streamed" / name) for name in FILES)
    assert streamed.results == resident.results


def test_a_child_in_mxfp4(tmp_path, sequences):
    folder = write_released_twin(tmp_path / "twin")
    rows = [[token % 60 + 3 for token in range(length)] for length in (9, 4)]
    sequences.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    run_importance(tmp_path / "resident", folder, sequences, dtype="bfloat16")
    run_importance(tmp_path / "streamed", folder, sequences, dtype="bfloat16", memory_gib=ENOUGH_GIB)
    assert all(same_files(tmp_path / "resident" / name, tmp_path / "streamed" / name) for name in FILES)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_killed_pass_goes_on_with_its_layer(parent, sequences, tmp_path, monkeypatch, layer):
    run_importance(tmp_path / "whole", parent, sequences, memory_gib=ENOUGH_GIB)
    with monkeypatch.context() as patched:
        stop_at(patched, layer)
        with pytest.raises(Killed):
            run_importance(tmp_path / "killed", parent, sequences, memory_gib=ENOUGH_GIB)
    assert not (tmp_path / "killed" / FILES[0]).exists()
    seen = layers_run(monkeypatch)
    run_importance(tmp_path / "killed", parent, sequences, memory_gib=ENOUGH_GIB)
    assert seen == list(range(layer, 4))
    assert all(same_files(tmp_path / "whole" / name, tmp_path / "killed" / name) for name in FILES)
    assert not list((tmp_path / "killed").glob("layers.*"))


def test_states_of_other_batches_are_not_gone_on_with(parent, sequences, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        with pytest.raises(Killed):
            run_importance(tmp_path / "killed", parent, sequences, memory_gib=ENOUGH_GIB)
    other = tmp_path / "other.jsonl"
    other.write_text(sequences.read_text().replace("[", "[7, ", 1))
    seen = layers_run(monkeypatch)
    run_importance(tmp_path / "killed", parent, other, memory_gib=ENOUGH_GIB)
    assert seen == [0, 1, 2, 3]
    run_importance(tmp_path / "fresh", parent, other)
    assert all(same_files(tmp_path / "fresh" / name, tmp_path / "killed" / name) for name in FILES)


@pytest.mark.parametrize("gib", [0.01, 1e-9])
def test_a_budget_below_one_layer_is_refused_with_the_number_needed(parent, sequences, tmp_path, gib):
    with pytest.raises(ValueError, match=rf"memory_gib={gib:g} was given; .* needs at least \d+\.\d\d GiB") as refused:
        run_importance(tmp_path / "run", parent, sequences, memory_gib=gib)
    assert "layer" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("gib", [0.0, -1.0, float("inf"), float("nan")])
def test_a_budget_that_is_none_is_refused(parent, sequences, tmp_path, gib):
    with pytest.raises(ValueError, match="above 0, or null"):
        run_importance(tmp_path / "run", parent, sequences, memory_gib=gib)
