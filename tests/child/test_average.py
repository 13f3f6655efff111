"""Averages: by hand, of whole folders, of MXFP4 experts, refused ones, and their sweep."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recovery_runs import make_child
from helpers.released_twin import twin_tensors, write_released_twin
from helpers.small_children import logits_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_puzzle.child import averaging
from lit_puzzle.child.average import average
from lit_puzzle.child.averaging import weighted
from lit_puzzle.child.settings import Sweep
from lit_puzzle.environments.environment import EFFORTS
from lit_puzzle.evaluate.held_out import HeldOut
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.model.checkpoint import Checkpoint, fingerprint
from lit_puzzle.model.identity import weights_identity
from lit_puzzle.model.mxfp4 import expert_weight
from lit_puzzle.run.lineage import ancestors
from lit_puzzle.tiny.world import Chains, Counting

WEIGHTS = "model.safetensors"


def changed(source: Path, target: Path, names: tuple[str, ...], seed: int = 1) -> Path:
    """A copy of a folder in which some tensors are trained, which are named by their ends."""
    shutil.copytree(source, target)
    tensors = load_file(source / WEIGHTS)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name.endswith(names):
            noise = torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else None
            tensors[name] = (tensor.flip(0) if noise is None else tensor + 0.1 * noise.to(tensor.dtype)).contiguous()
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
    return target


@pytest.fixture
def pair(tmp_path: Path, tiny_config: Any) -> tuple[Path, Path]:
    """A child in bfloat16 and the same with other attention."""
    first = make_child(tmp_path / "first", tiny_config(num_hidden_layers=2), experts=(4, 2))
    return first, changed(first, tmp_path / "second", ("q_proj.weight", "o_proj.weight"))


def test_weighted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.tensor([1.0, 2.0, -4.0]), torch.tensor([3.0, 2.0, 4.0])
    assert weighted(first, second, 0.25).tolist() == [2.5, 2.0, 2.0]
    a, b = torch.randn(2, 5, 7).bfloat16()
    exact = 0.3 * a.double() + 0.7 * b.double()
    monkeypatch.setattr(averaging, "CHUNK", 4)  # several chunks, the last one shorter
    found = weighted(a, b, 0.3)
    assert found.dtype == torch.bfloat16 and found.shape == (5, 7)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8 + 1e-5, atol=1e-6)
    assert torch.equal(weighted(a, b, 1.0), a) and torch.equal(weighted(a, b, 0.0), b)
    large = torch.tensor([60000.0, 1.0]).half()  # the sum of both leaves float16
    assert weighted(large, large, 0.5).tolist() == large.tolist()


def test_the_average_of_two_folders(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    results = average(tmp_path / "run", *pair, share=0.25)
    first, second, made = (load_file(folder / WEIGHTS) for folder in (*pair, tmp_path / "run" / "child"))
    assert made.keys() == first.keys()
    for name, tensor in made.items():
        exact = 0.25 * first[name].double() + 0.75 * second[name].double()
        assert tensor.dtype == first[name].dtype
        if torch.equal(first[name], second[name]):
            assert torch.equal(tensor, first[name]), name
        else:
            torch.testing.assert_close(tensor.double(), exact, rtol=2**-8 + 1e-5, atol=1e-6)
    assert (results["averaged_tensors"], results["share"]) == (4.0, 0.25)
    assert results["averaged_tensors"] + results["copied_tensors"] == len(made)
    for path in pair[0].iterdir():
        if path.name != WEIGHTS:
            assert path.read_bytes() == (tmp_path / "run" / "child" / path.name).read_bytes()
    assert logits_of(tmp_path / "run" / "child", trust_remote_code=True).isfinite().all()
    steps = ancestors(weights_identity(tmp_path / "run" / "child"), [tmp_path / "run"])
    assert set(steps[0].inputs) == {"first", "second"}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_end_is_one_of_the_two(tmp_path: Path, pair: tuple[Path, Path], share: float) -> None:
    average(tmp_path / "run", *pair, share=share)
    assert fingerprint(tmp_path / "run" / "child") == fingerprint(pair[0] if share else pair[1])


def packed_child(folder: Path) -> Path:
    """The twin of the released model in one file, without KV scales."""
    write_released_twin(folder)
    for path in folder.glob("model*"):
        path.unlink()
    tensors = {name: tensor for name, tensor in twin_tensors().items() if not name.endswith(("k_scale", "v_scale"))}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def test_equal_mxfp4_experts_are_copied(tmp_path: Path) -> None:
    first = packed_child(tmp_path / "first")
    second = changed(first, tmp_path / "second", ("q_proj.weight",))
    average(tmp_path / "run", first, second)
    made, ours = Checkpoint(tmp_path / "run" / "child"), Checkpoint(first)
    packed = [name for name in ours.tensors if name.endswith(("_blocks", "_scales"))]
    assert len(packed) == 24 and made.mxfp4_layers == ours.mxfp4_layers
    assert all(torch.equal(made.read(name), ours.read(name)) for name in packed)


def test_different_mxfp4_experts_are_refused_or_dequantized(tmp_path: Path) -> None:
    first = packed_child(tmp_path / "first")
    layer = "model.layers.1.mlp.experts."
    second = changed(first, tmp_path / "second", (f"{layer}down_proj_blocks",))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj_blocks differs .* mxfp4: dequantize"):
        average(tmp_path / "run", first, second)
    average(tmp_path / "run", first, second, share=0.5, mxfp4="dequantize")
    made, ours, theirs = (Checkpoint(folder) for folder in (tmp_path / "run" / "child", first, second))
    assert not made.mxfp4_layers and "quantization_config" not in made.config

    def plain(checkpoint: Checkpoint, name: str) -> Tensor:
        return expert_weight(checkpoint.read(f"{name}_blocks"), checkpoint.read(f"{name}_scales")).float()

    mean = (plain(ours, f"{layer}down_proj") + plain(theirs, f"{layer}down_proj")) / 2
    assert torch.equal(made.read(f"{layer}down_proj"), mean.bfloat16())
    other = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(made.read(other).float(), plain(ours, other))


def test_unlike_checkpoints_are_refused(tmp_path: Path, pair: tuple[Path, Path], tiny_config: Any) -> None:
    def refused(second: Path, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message) as refusal:
            average(tmp_path / "run", pair[0], second, **options)
        assert "\n" not in str(refusal.value)

    refused(pair[1], r"share 1\.5 was given", share=1.5)
    refused(pair[1], r"share nan was given", share=float("nan"))
    refused(tmp_path / "nothing", "nothing")
    other = make_child(tmp_path / "other", tiny_config(num_hidden_layers=2), experts=(4, 3))
    refused(other, "different architectures \\(blocks\\)")
    planned = changed(pair[0], tmp_path / "planned", ())
    (planned / "plan.json").write_text(json.dumps({"other": "experts"}))
    refused(planned, "different plans")
    worded = changed(pair[0], tmp_path / "worded", ())
    (worded / "tokenizer.json").write_text((worded / "tokenizer.json").read_text() + "\n")
    refused(worded, "different tokenizers")
    wide = changed(pair[0], tmp_path / "wide", ())
    save_file({name: tensor.float() for name, tensor in load_file(wide / WEIGHTS).items()}, wide / WEIGHTS)
    refused(wide, "is BF16 in .* and F32 in")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused(adapter, "is a LoRA adapter, not a whole checkpoint")
    broken = changed(pair[0], tmp_path / "broken", ())
    tensors = load_file(broken / WEIGHTS)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / WEIGHTS)
    refused(broken, "model.norm.weight")
    assert not (tmp_path / "run" / "child").exists()
    shutil.copytree(pair[0], tmp_path / "own" / "child")
    with pytest.raises(ValueError, match="would be replaced by an average of itself"):
        average(tmp_path / "own", tmp_path / "own" / "child", pair[1])
    twin = write_released_twin(tmp_path / "twin")
    with pytest.raises(ValueError, match="KV scales belong to one set of weights"):
        average(tmp_path / "run", twin, twin)


def test_a_sweep_measures_each_share_once(
    tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = HeldOut([Chains(), Counting()], prompts_per_effort=4)
    sweep = Sweep(held_out, [1.0, 0.5, 0.0], Sampling(6, temperature=0.0), EngineSettings("transformers"))
    results = average(tmp_path / "run", *pair, sweep=sweep)
    for share in ("0", "0.5", "1"):
        assert {f"{share}/{key}/{effort}" for key in ("accuracy", "tokens", "looping") for effort in EFFORTS} <= set(
            results
        )
        assert results[f"{share}/effort_length_ratio"] > 0
    printed = capsys.readouterr().out
    assert "Share of the first" in printed and "high / low" in printed
    assert sorted(path.name for path in (tmp_path / "run" / "sweep").iterdir()) == ["0", "0.5", "1"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "sweep").glob("*/episodes.parquet")}
    assert average(tmp_path / "run", *pair, sweep=sweep) == results
    assert times == {path: path.stat().st_mtime_ns for path in times}
    for bad, message in (([], "at least one"), ([0.5, 0.5], "none of them twice"), ([-0.1], r"sweep\.shares -0\.1")):
        with pytest.raises(ValueError, match=message):
            Sweep(held_out, bad)
