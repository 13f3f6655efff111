"""Checkpoint folders: what transformers and the released format hold is read exactly, all else is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.released_twin import twin_tensors, write_released_twin
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssForCausalLM

from lit_puzzle.model.checkpoint import Checkpoint, fingerprint
from lit_puzzle.run.verify import verifying
from lit_puzzle.serve.checksums import checksums

Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def stock_folder(tmp_path: Path, tiny_model: GptOssForCausalLM) -> Path:
    tiny_model.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def rewrite(folder: Path, change: Change) -> None:
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_every_tensor_of_a_stock_folder(stock_folder: Path, tiny_model: GptOssForCausalLM) -> None:
    checkpoint = Checkpoint(stock_folder)
    state = tiny_model.state_dict()
    assert checkpoint.tensors.keys() == state.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())
    assert checkpoint.blocks == [(8, 8), (8, None), (8, 8), (8, None)]
    assert not checkpoint.mxfp4_layers and checkpoint.num_layers == 4


def test_layers_and_the_rest_are_everything_once(stock_folder: Path, tiny_model: GptOssForCausalLM) -> None:
    checkpoint = Checkpoint(stock_folder)
    names = [name for name in checkpoint.tensors if not name.startswith("model.layers.")]
    assert sorted(names) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    for layer in range(4):
        tensors = checkpoint.layer(layer)
        names += [f"model.layers.{layer}.{name}" for name in tensors]
        tiny_model.model.layers[layer].load_state_dict(tensors)  # strict: the names inside a layer are the module's
    assert sorted(names) == sorted(tiny_model.state_dict())


def test_sharded_folder_of_transformers_is_the_same_checkpoint(
    stock_folder: Path, tiny_model: GptOssForCausalLM, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    checkpoint = Checkpoint(tmp_path / "sharded")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tiny_model.state_dict().items())
    assert fingerprint(tmp_path / "sharded") == fingerprint(stock_folder)


def test_released_twin_is_read_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_released_twin(tmp_path / "twin"))
    tensors = twin_tensors()
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    assert checkpoint.mxfp4_layers == set(range(6))
    assert checkpoint.blocks[3] == (4, 16)


def test_reading_rows_touches_no_other_file_bytes(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_released_twin(tmp_path / "twin"))
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    part = checkpoint.read(name)[2:4]
    assert part.data_ptr() - checkpoint.read(name).data_ptr() == 2 * part[0].nbytes  # a view, not a copy
    assert torch.equal(part, twin_tensors()[name][2:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.2.self_attn.sinks"), r"missing tensor model\.layers\.2\.self_attn\.sinks"),
        (
            lambda t: t.pop("lm_head.weight"),
            r"safetensors: missing tensor lm_head\.weight of shape \(128, 32\)$",
        ),
        (
            lambda t: [t.pop(name) for name in ("lm_head.weight", "model.norm.weight")],
            r"missing tensor model\.norm\.weight of shape \(32,\), and 1 more: lm_head\.weight$",
        ),
        (lambda t: t.update({"model.layers.4.mlp.router.bias": torch.ones(8)}), r"unknown tensor model\.layers\.4"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), r"unknown tensor model\.extra of shape \(2,\)"),
        (
            lambda t: t.update({"model.layers.1.mlp.router.bias": torch.ones(7)}),
            r"router\.bias has shape \(7,\), .*config\.json implies \(8,\) \(.*num_local_experts",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.uint8)}),
            r"model\.norm\.weight has dtype U8; allowed: floating point",
        ),
        (lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(())}), r"v_scale is missing"),
        (
            lambda t: t.update({f"model.layers.0.self_attn.{n}_scale": torch.ones(3) for n in "kv"}),
            r"k_scale has shape \(3,\)",
        ),
    ],
)
def test_tensors_unlike_the_config_are_named(stock_folder: Path, change: Change, message: str) -> None:
    rewrite(stock_folder, change)
    with pytest.raises(ValueError, match=message):
        Checkpoint(stock_folder)


def test_kv_scales_are_accepted_as_scalars_and_per_head(stock_folder: Path) -> None:
    for scale in (torch.ones(()), torch.ones(1), torch.ones(2)):
        scales = {f"model.layers.0.self_attn.{kind}_scale": scale.clone() for kind in "kv"}
        rewrite(stock_folder, lambda t, s=scales: t.update(s))  # type: ignore[misc]
        assert torch.equal(Checkpoint(stock_folder).layer(0)["self_attn.k_scale"], scale)


def test_half_an_mxfp4_layer_is_refused(tmp_path: Path) -> None:
    folder = write_released_twin(tmp_path / "twin")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        tensors.pop("model.layers.1.mlp.experts.down_proj_scales", None)
        save_file(tensors, path)
    with pytest.raises(ValueError, match=r"missing tensor model\.layers\.1\.mlp\.experts\.down_proj_scales"):
        Checkpoint(folder)


def test_truncated_weights_name_tensor_and_file(stock_folder: Path) -> None:
    path = stock_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated: model\.\S+ ends at byte"):
        Checkpoint(stock_folder)


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("lm_head.weight"), r"lm_head\.weight is in model-00001.*says None"),
        (lambda m: m.update({"lm_head.weight": "model-00002-of-00002.safetensors"}), r"lm_head\.weight is in"),
        (lambda m: m.update({"ghost": "model-00002-of-00002.safetensors"}), "missing tensor ghost"),
        (lambda m: m.update({"ghost": "../outside.safetensors"}), r"lists the files \['\.\./outside"),
    ],
)
def test_index_that_does_not_match_is_refused(
    tmp_path: Path, change: Callable[[dict[str, str]], None], message: str
) -> None:
    folder = write_released_twin(tmp_path / "twin")
    edit_index(folder, change)
    with pytest.raises(ValueError, match=message):
        Checkpoint(folder)


def test_missing_stray_and_doubled_files_are_refused(tmp_path: Path) -> None:
    folder = write_released_twin(tmp_path / "twin")
    shard = folder / "model-00002-of-00002.safetensors"
    shutil.copy(shard, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"the folder has \['model-00001"):
        Checkpoint(folder)
    (folder / "model.safetensors").unlink()
    shard.unlink()
    with pytest.raises(ValueError, match=r"lists the files"):
        Checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors alone nor"):
        Checkpoint(folder)
    with pytest.raises(ValueError, match="is not a folder"):
        Checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "a.pkl"])
def test_pickles_are_never_opened(stock_folder: Path, name: str) -> None:
    (stock_folder / name).write_bytes(b"no pickle at all")
    with pytest.warns(UserWarning, match=rf"stock: {name} is ignored, the weights are read from safetensors"):
        assert Checkpoint(stock_folder).tensors
    (stock_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"pickles only \({name}\).*convert them to safetensors"):
        Checkpoint(stock_folder)


MATRIX, SCALES = "model.layers.1.mlp.experts.down_proj", "model.layers.2.mlp.experts.down_proj_scales"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_are_checked_when_they_are_first_read(stock_folder: Path, value: float) -> None:
    rewrite(stock_folder, lambda t: t[MATRIX][3, 1].fill_(value))
    checkpoint = Checkpoint(stock_folder)
    assert checkpoint.read("lm_head.weight").isfinite().all() and not checkpoint.view(MATRIX).isfinite().all()
    for check in (lambda: checkpoint.read(MATRIX), lambda: checkpoint.layer(1), checkpoint.check_all):
        with pytest.raises(
            ValueError, match=rf"model\.safetensors: {MATRIX} has 32 of 2048 values that are not finite"
        ):
            check()


@pytest.mark.parametrize("scale", [253, 255])
def test_scales_that_stand_for_no_number_are_refused(tmp_path: Path, scale: int) -> None:
    folder = write_released_twin(tmp_path / "twin")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if SCALES in tensors:
            tensors[SCALES][0, 0, 0] = scale
            save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{SCALES} has a scale byte of {scale}"):
        Checkpoint(folder).layer(2)


def test_everything_is_checked_first_where_that_is_asked_for(
    stock_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with verifying("full"):
        Checkpoint(stock_folder)
        rewrite(stock_folder, lambda t: t[MATRIX].fill_(float("nan")))
        with pytest.raises(ValueError, match=f"{MATRIX} has 2048 of 2048 values that are not finite"):
            Checkpoint(stock_folder)
        rewrite(stock_folder, lambda t: t[MATRIX].fill_(0.0))
        Checkpoint(stock_folder)
        monkeypatch.setattr("lit_puzzle.model.safetensors_file.check_values", None)  # the same files are not read again
        Checkpoint(stock_folder)
    Checkpoint(stock_folder)


def test_folder_is_compared_with_its_checksums(stock_folder: Path) -> None:
    (stock_folder / "README.md").write_text("a card")
    with checksums() as sums:
        sums.write(stock_folder)
    Checkpoint(stock_folder).check_checksums()
    (stock_folder / "README.md").write_text("a better card")
    Checkpoint(stock_folder).check_checksums()
    rewrite(stock_folder, lambda t: t[MATRIX][0, 0, 0].add_(1.0))
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file of .*SHA256SUMS"):
        Checkpoint(stock_folder).check_checksums()
    settings = stock_folder / "generation_config.json"
    settings.write_text(settings.read_text() + " ")
    with pytest.raises(ValueError, match=r"generation_config\.json is not the file of .*SHA256SUMS"):
        Checkpoint(stock_folder)


def test_quantization_that_is_not_what_is_stored_is_refused(stock_folder: Path, tmp_path: Path) -> None:
    packed = write_released_twin(tmp_path / "twin")
    config = json.loads((packed / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization_config is missing, but the experts are stored as MXFP4"):
        Checkpoint(packed)
    stock = json.loads((stock_folder / "config.json").read_text())
    (stock_folder / "config.json").write_text(json.dumps(stock | {"quantization_config": quantization}))
    with pytest.raises(ValueError, match="quantization_config is given, but the experts are stored as plain"):
        Checkpoint(stock_folder)


@pytest.mark.parametrize(
    "change",
    [{"rms_norm_eps": 1e-6}, {"swiglu_limit": 6.0}, {"rope_scaling": None, "rope_parameters": {"rope_theta": 1.0}}],
)
def test_fingerprint_tells_what_the_config_makes_of_the_weights(stock_folder: Path, change: dict[str, object]) -> None:
    before, file = fingerprint(stock_folder), stock_folder / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"transformers_version": "4.0"}))
    assert fingerprint(stock_folder) == before
    file.write_text(json.dumps(content | change))
    assert fingerprint(stock_folder) != before


def test_fingerprint_tells_parents_apart(stock_folder: Path) -> None:
    before = fingerprint(stock_folder)
    assert fingerprint(stock_folder) == before
    rewrite(stock_folder, lambda t: t["model.layers.3.mlp.router.bias"].add_(1e-3))
    changed = fingerprint(stock_folder)
    rewrite(
        stock_folder, lambda t: t.update({n: t[n].flip(0) for n in t if ".2.mlp." in n})
    )  # experts in another order
    assert len({before, changed, fingerprint(stock_folder)}) == 3


def test_fingerprint_follows_windows_but_not_versions(stock_folder: Path) -> None:
    path = stock_folder / "config.json"
    before, config = fingerprint(stock_folder), json.loads(path.read_text())
    path.write_text(json.dumps(config | {"transformers_version": "0", "use_cache": False}))
    assert fingerprint(stock_folder) == before
    path.write_text(json.dumps(config | {"sliding_window": 4}))
    assert fingerprint(stock_folder) != before


def test_fingerprint_samples_large_tensors_from_end_to_end(tmp_path: Path, tiny_model: GptOssForCausalLM) -> None:
    """A vocabulary of 20,000 makes embeddings of 2.4 MiB: only pages of them count, both ends included."""
    tiny_model.resize_token_embeddings(20000)
    tiny_model.save_pretrained(tmp_path / "large")
    seen = [fingerprint(tmp_path / "large")]
    for row in (0, -1):
        rewrite(tmp_path / "large", lambda t, r=row: t["lm_head.weight"][r].add_(1.0))  # type: ignore[misc]
        seen.append(fingerprint(tmp_path / "large"))
    assert len(set(seen)) == 3
