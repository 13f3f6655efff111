"""Trained weights in shared memory: what an engine gets is what was trained, beside the unchanged rest of a folder."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lit_puzzle.generation.trained_weights import SharedWeights, completed
from lit_puzzle.model.checkpoint import Checkpoint

CHILD = Path(__file__).parents[2] / "lit_puzzle" / "assets" / "tiny_child"


def shared(tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> SharedWeights:
    weights = SharedWeights({name: tuple(tensor.shape) for name, tensor in tensors.items()}, dtype)
    for name, tensor in tensors.items():
        weights.write(name, tensor)
    return weights


def query_weights(value: float) -> dict[str, torch.Tensor]:
    infos = Checkpoint(CHILD).tensors
    return {name: torch.full(infos[name].shape, value) for name in infos if name.endswith("q_proj.weight")}


def test_another_library_reads_what_was_written():
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(()), "c": torch.randn(7)}
    for dtype in (torch.float32, torch.bfloat16):
        weights = shared(tensors, dtype)
        with safe_open(str(weights.path), "pt") as file:
            assert set(file.keys()) == set(tensors)
            assert all(torch.equal(file.get_tensor(name), tensors[name].to(dtype)) for name in tensors)
        assert weights.num_bytes == 23 * dtype.itemsize
        assert weights.path.stat().st_size < weights.num_bytes + 1000  # only what trained
        weights.close()
        assert not weights.path.exists()


def test_a_tensor_is_written_again_in_its_place():
    weights = shared({"a": torch.zeros(4), "b": torch.ones(4)})
    weights.write("a", torch.arange(4.0))
    with safe_open(str(weights.path), "pt") as file:
        assert file.get_tensor("a").tolist() == [0, 1, 2, 3] and file.get_tensor("b").tolist() == [1] * 4


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="a would be written with values that are NaN or infinite"):
        shared({"a": torch.tensor([1.0, value])})


def test_an_engine_gets_sent_tensors_and_the_unchanged_ones_beside_them():
    sent, stored = query_weights(0.25), Checkpoint(CHILD)
    weights = shared(sent)
    found = dict(completed(weights.path, CHILD))
    frozen = [name for name in stored.tensors if ".mlp.experts." in name or ".mlp.router." in name]
    assert set(found) == set(stored.tensors) - set(frozen) and frozen
    for name, tensor in found.items():
        assert torch.equal(tensor, sent[name]) if name in sent else torch.equal(tensor, stored.read(name))


def test_a_kind_of_which_something_is_sent_comes_whole():
    router = "model.layers.1.mlp.router.weight"
    weights = shared({router: torch.zeros(Checkpoint(CHILD).tensors[router].shape)})
    found = dict(completed(weights.path, CHILD))
    assert "model.layers.0.mlp.router.bias" in found and not found[router].any()
    assert not any(".mlp.experts." in name for name in found)


def test_a_tensor_that_the_folder_does_not_have_is_refused():
    weights = shared({"model.layers.0.other": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.other was trained; .* has no tensor of that name"):
        next(completed(weights.path, CHILD))
