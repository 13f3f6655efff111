"""Experts of an exported folder: the parent's bytes if they were frozen, the nearest codes if they were trained."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from helpers.released_twin import twin_tensors, write_released_twin
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssForCausalLM

from lit_puzzle.child.assemble import assemble
from lit_puzzle.model.checkpoint import Checkpoint, fingerprint
from lit_puzzle.serve.experts import Rounding
from lit_puzzle.serve.export import export
from lit_puzzle.serve.settings import Storage
from lit_puzzle.spec import BlockSpec, Plan

ASSETS = Path(__file__).parents[2] / "lit_puzzle" / "assets"
WORDS = ASSETS / "tiny_parent"
KEPT = [(0, 2, 5), tuple(range(8)), (1, 7), (0, 3), (3,), (1, 2, 3)]
WINDOWS = [4, None, 4, 16, 4, None]
PROMPT = torch.randint(8, 128, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    return write_released_twin(tmp_path / "twin")


@pytest.fixture
def child(tmp_path: Path, twin: Path) -> Path:
    """A pruned child of the MXFP4 twin, its experts still packed."""
    blocks = tuple(BlockSpec(*block) for block in zip(KEPT, WINDOWS, strict=True))
    Plan(fingerprint(twin), 8, blocks).save(tmp_path / "plan.json")
    assemble(tmp_path / "assembled", twin, plan=tmp_path / "plan.json")
    return tmp_path / "assembled" / "child"


@pytest.fixture
def plain(tmp_path: Path, child: Path) -> Path:
    """The same child with its experts in bfloat16."""
    export(tmp_path / "unpacked", child, tokenizer=WORDS, storage=Storage(experts="plain"))
    return tmp_path / "unpacked" / "model"


def experts_of(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors if ".experts." in name}


def logits_of(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(PROMPT).logits


def packed_rows(name: str) -> Tensor:
    """The twin's tensor of the experts that were kept, straight from its generator."""
    return twin_tensors()[name][list(KEPT[int(name.split(".")[2])])]


def test_packed_experts_are_the_parents_bytes(tmp_path: Path, child: Path) -> None:
    for how in ("stored", "mxfp4"):
        results = export(tmp_path / how, child, tokenizer=WORDS, storage=Storage(experts=how))
        written = experts_of(tmp_path / how / "model")
        assert all(torch.equal(tensor, packed_rows(name)) for name, tensor in written.items())
        assert results["mxfp4_layers"] == 6 and results["rounded_experts"] == results["copied_experts"] == 0


def test_unpacking_changes_no_logit(child: Path, plain: Path) -> None:
    assert {tensor.dtype for tensor in experts_of(plain).values()} == {torch.bfloat16}
    assert "quantization_config" not in Checkpoint(plain).config
    assert torch.equal(logits_of(plain), logits_of(child))


def test_frozen_experts_get_the_parents_bytes_and_trained_ones_are_rounded(
    tmp_path: Path, twin: Path, plain: Path
) -> None:
    tensors = load_file(plain / "model.safetensors")
    trained = tensors["model.layers.1.mlp.experts.down_proj"]
    trained[3] += 0.01 * torch.randn(trained[3].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_file(tensors, plain / "model.safetensors")
    (plain / "SHA256SUMS").unlink()
    results = export(tmp_path / "run", plain, storage=Storage(experts="mxfp4", mxfp4_parent=twin))
    assert results["copied_experts"] == 2 * sum(len(kept) for kept in KEPT) - 1 and results["rounded_experts"] == 1
    for name, tensor in experts_of(tmp_path / "run" / "model").items():
        same = [bool(torch.equal(ours, theirs)) for ours, theirs in zip(tensor, packed_rows(name), strict=True)]
        changed = name.startswith("model.layers.1.mlp.experts.down_proj_") and not name.endswith("_bias")
        assert same == [not changed or expert != 3 for expert in range(len(same))], name


def test_rounded_experts_are_the_nearest_codes(tmp_path: Path) -> None:
    """Against all 16 codes under the smallest power of two that clips nothing, one value after the other."""
    source = ASSETS / "tiny_child"
    results = export(tmp_path, source, storage=Storage(experts="mxfp4"))
    original, written = experts_of(source), experts_of(tmp_path / "model")
    assert results["rounded_experts"] == 2 * (16 + 8 + 12 + 8 + 12 + 8) and results["mxfp4_layers"] == 6
    signs = (1.0, -1.0)
    codes = torch.tensor([sign * value for sign in signs for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], dtype=torch.double)
    squares = [0.0, 0.0]
    for layer, name in itertools.product(range(6), ("gate_up_proj", "down_proj")):
        stem = f"model.layers.{layer}.mlp.experts.{name}"
        values = original[stem].double().transpose(1, 2).unflatten(-1, (-1, 32))  # expert, row, block, value
        blocks, scales = written[f"{stem}_blocks"], written[f"{stem}_scales"]
        power = 2.0 ** (scales.double() - 127)
        largest = values.abs().amax(-1)
        assert (largest <= 6 * power).all() and (largest > 3 * power).all()
        halves = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
        chosen = codes[halves] * power.unsqueeze(-1)
        distance = (values.unsqueeze(-1) - codes * power[..., None, None]).abs()
        assert torch.equal((values - chosen).abs(), distance.amin(-1))
        squares[0] += float((values - chosen).square().sum())
        squares[1] += float(values.square().sum())
    assert results["rounding_error"] == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-6)
    assert 0.05 < results["rounding_error"] < 0.2
    assert f"relative error {results['rounding_error']:.4g}" in (tmp_path / "model" / "README.md").read_text()


def test_packing_what_was_unpacked_keeps_every_value(tmp_path: Path, plain: Path, child: Path) -> None:
    results = export(tmp_path / "again", plain, storage=Storage(experts="mxfp4"))
    assert results["rounded_experts"] == 2 * sum(len(kept) for kept in KEPT) and results["rounding_error"] == 0
    assert torch.equal(logits_of(tmp_path / "again" / "model"), logits_of(child))


def test_layers_may_be_packed_or_not_one_by_one(tmp_path: Path, child: Path, plain: Path) -> None:
    """Layer 2 is plain, the others are packed; the config says so, or transformers would look for blocks in layer 2."""
    tensors, unpacked = load_file(child / "model.safetensors"), load_file(plain / "model.safetensors")
    mixed = {name: tensor for name, tensor in tensors.items() if ".2.mlp.experts." not in name}
    mixed |= {name: tensor for name, tensor in unpacked.items() if ".2.mlp.experts." in name}
    shutil.copytree(child, tmp_path / "mixed")
    save_file(mixed, tmp_path / "mixed" / "model.safetensors")
    results = export(tmp_path / "run", tmp_path / "mixed", tokenizer=WORDS)
    assert results["mxfp4_layers"] == 5
    named = Checkpoint(tmp_path / "run" / "model").config["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.2.mlp.experts" in named and "model.layers.1.mlp.experts" not in named
    assert torch.equal(logits_of(tmp_path / "run" / "model"), logits_of(child))


def test_error_of_nothing_is_zero() -> None:
    rounding = Rounding()
    assert rounding.relative_error() == 0
    rounding.round(torch.tensor([[1.25] + [0.0] * 30 + [6.0]]))  # between 1 and 1.5: to even
    assert rounding.relative_error() == pytest.approx(0.25 / (1.25**2 + 36) ** 0.5)


def test_rounding_leaves_stored_values_as_they_are() -> None:
    stored = torch.linspace(-3, 7, 64).reshape(2, 32)  # in float32 they are not copied on their way
    before = stored.clone()
    Rounding().round(stored)
    assert torch.equal(stored, before)


def test_wrong_mxfp4_parents_are_refused(tmp_path: Path, twin: Path, plain: Path, child: Path) -> None:
    with pytest.raises(ValueError, match=r"mxfp4_parent needs storage\.experts: mxfp4 \(given: stored\)"):
        export(tmp_path / "run", plain, storage=Storage(mxfp4_parent=twin))
    other = write_released_twin(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="expert indices would mean other experts"):
        export(tmp_path / "run", plain, storage=Storage(experts="mxfp4", mxfp4_parent=other))
    (plain / "plan.json").unlink()
    (plain / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"which lists the experts that were kept \(missing\)"):
        export(tmp_path / "run", plain, storage=Storage(experts="mxfp4", mxfp4_parent=twin))
    blocks = tuple(BlockSpec(tuple(range(len(kept))), window) for kept, window in zip(KEPT, WINDOWS, strict=True))
    Plan(fingerprint(plain), 8, blocks).save(child / "plan.json")
    with pytest.raises(ValueError, match=r"no MXFP4 experts in layers \[0, 1, 2, 3, 4, 5\]"):
        export(tmp_path / "run", child, tokenizer=WORDS, storage=Storage(experts="mxfp4", mxfp4_parent=plain))
    assert not (tmp_path / "run" / "model").exists()


def test_rows_that_do_not_divide_into_blocks_are_refused(tmp_path: Path, tiny_model: GptOssForCausalLM) -> None:
    tiny_model.save_pretrained(tmp_path / "small")  # intermediate size 8
    with pytest.raises(ValueError, match=r"down_proj has rows of 8 values; MXFP4 has one scale for 32"):
        export(tmp_path / "run", tmp_path / "small", tokenizer=WORDS, storage=Storage(experts="mxfp4"))
