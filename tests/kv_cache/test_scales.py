"""The files of KV scales: saving and loading keeps them, and damaged, missing or foreign files are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_puzzle.kv_cache.scales import META_FILE, SCALES_FILE, KVScales, LayerScales, TensorScale, check_shape
from lit_puzzle.model.checkpoint import Checkpoint

K1 = "model.layers.1.self_attn.k_scale"
V1 = "model.layers.1.self_attn.v_scale"


def one(amax, scale, overflow=0) -> TensorScale:
    return TensorScale(torch.tensor(amax), torch.tensor(scale), overflow)


def some_scales() -> KVScales:
    per_head = LayerScales(one([3.3, 0.1], [0.0078125, 0.00025]), one([1.0, 7.0], [0.5, 0.5]))
    return KVScales(
        "abc", "gpt_oss", "mse", "none", 17, (None, LayerScales(one(1000.0, 2.0, 5), one(896.0, 4.0)), per_head)
    )


def test_saved_scales_are_loaded_unchanged(tmp_path):
    saved = some_scales()
    saved.save(tmp_path / "new" / "folder")
    loaded = KVScales.load(tmp_path / "new" / "folder")
    found = loaded.fingerprint, loaded.model_type, loaded.method, loaded.rounding, loaded.tokens
    assert found == ("abc", "gpt_oss", "mse", "none", 17)
    assert loaded.layers[0] is None
    for before, after in zip(saved.layers[1:], loaded.layers[1:], strict=True):
        for kind in ("k", "v"):
            old, new = vars(before)[kind], vars(after)[kind]
            assert torch.equal(old.amax, new.amax) and new.amax.dtype == torch.float32
            assert torch.equal(old.scale, new.scale) and new.scale.dtype == torch.float32
            assert old.overflow == new.overflow
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {META_FILE, SCALES_FILE}


def test_files_follow_the_format(tmp_path):
    some_scales().save(tmp_path)
    tensors = load_file(tmp_path / SCALES_FILE)
    assert sorted(tensors) == [K1, V1, K1.replace("1", "2"), V1.replace("1", "2")]
    assert (tensors[K1].shape, tensors[K1].dtype) == (torch.Size([]), torch.float32)
    layer = json.loads((tmp_path / META_FILE).read_text())["layers"][1]
    assert layer["k_amax"] == 1000.0 and layer["k_scale"] == 2.0 and layer["k_overflow"] == 5
    assert layer["v_headroom"] == 1.0  # 448 * 4 = 2 * 896


def test_headroom_is_the_least_of_all_heads():
    assert one([448.0, 112.0], [4.0, 0.5]).headroom == 1.0
    assert one(896.0, 1.0).headroom == -1.0


def save_edited(tmp_path, change_meta=None, change_tensors=None) -> None:
    some_scales().save(tmp_path)
    meta, tensors = json.loads((tmp_path / META_FILE).read_text()), load_file(tmp_path / SCALES_FILE)
    (change_meta or (lambda meta: None))(meta)
    (change_tensors or (lambda tensors: None))(tensors)
    (tmp_path / META_FILE).write_text(json.dumps(meta))
    save_file(tensors, tmp_path / SCALES_FILE)


def test_a_missing_scale_is_named(tmp_path):
    save_edited(tmp_path, change_tensors=lambda tensors: tensors.pop(V1))
    with pytest.raises(ValueError, match=f"{V1} is missing from {SCALES_FILE}"):
        KVScales.load(tmp_path)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_scales_and_amax_that_json_lacks_are_refused(tmp_path, bad):
    save_edited(tmp_path, lambda meta: meta["layers"][1].update(k_amax=bad))
    with pytest.raises(ValueError, match=f"{META_FILE}: .* is not a JSON number"):
        KVScales.load(tmp_path)


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_scales_and_amax_must_be_positive(tmp_path, bad):
    def change(meta):
        meta["layers"][1]["k_amax"] = bad

    save_edited(tmp_path, change)
    with pytest.raises(ValueError, match=r"amax of model.layers.1.self_attn.k_scale is .* must be positive and finite"):
        KVScales.load(tmp_path)
    save_edited(tmp_path, lambda meta: meta["layers"][1].update(v_scale=bad), lambda t: t[V1].fill_(bad))
    with pytest.raises(ValueError, match=f"{V1} is .* must be positive and finite"):
        KVScales.load(tmp_path)


def test_files_that_disagree_are_refused(tmp_path):
    save_edited(tmp_path, change_tensors=lambda tensors: tensors[K1].mul_(2))
    with pytest.raises(ValueError, match=f"{K1} is 4.0, but {META_FILE} says 2.0"):
        KVScales.load(tmp_path)
    save_edited(
        tmp_path, change_tensors=lambda tensors: tensors.update({"model.layers.0.self_attn.k_scale": torch.ones(())})
    )
    with pytest.raises(ValueError, match=r"contains model\.layers\.0\.self_attn\.k_scale, which is not in"):
        KVScales.load(tmp_path)
    save_edited(tmp_path, lambda meta: meta.update(model_type="llama"))
    with pytest.raises(ValueError, match=r"damaged \(.*model_type 'llama' is not supported"):
        KVScales.load(tmp_path)
    (tmp_path / SCALES_FILE).write_bytes(b"short")
    with pytest.raises(ValueError, match="damaged"):
        KVScales.load(tmp_path)
    (tmp_path / SCALES_FILE).unlink()
    with pytest.raises(ValueError, match=r"Make them with: lightning run recipes/calibrate_kv\.yaml"):
        KVScales.load(tmp_path)


def test_scales_of_another_checkpoint_are_refused():
    some_scales().check_checkpoint("abc")
    with pytest.raises(ValueError, match="The KV scales are of checkpoint abc, not of def"):
        some_scales().check_checkpoint("def")


def test_a_checkpoint_accepts_the_tensors(tiny_model, tmp_path):
    """Names and shapes are those of KV scales in checkpoints."""
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | some_scales().tensors(), tmp_path / "model.safetensors", {"format": "pt"})
    assert float(Checkpoint(tmp_path).read(K1)) == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(method="median"), "method is 'median'; allowed: amax, percentile, mse"),
        (lambda meta: meta.update(rounding=None), "rounding is None"),
        (lambda meta: meta.update(fingerprint=3), "fingerprint is 3"),
        (lambda meta: meta.update(tokens=-1), "tokens must be a whole number of at least 1, got -1"),
        (lambda meta: meta.update(layers=7), "damaged"),
        (lambda meta: meta["layers"].__setitem__(1, "none"), "damaged"),
        (lambda meta: meta["layers"][1].update(k_overflow=float("inf")), "Infinity is not a JSON number"),
        (lambda meta: meta["layers"][1].update(k_overflow=-2), "overflow must be a whole number"),
        (lambda meta: meta["layers"][1].update(k_amax="big"), "damaged"),
        (lambda meta: meta.update(rounding="power_of_two"), r"layers\.2\..*k_scale is .* no power of two"),
    ],
)
def test_files_with_wrong_values_are_refused(tmp_path, change, message):
    save_edited(tmp_path, change)
    with pytest.raises(ValueError, match=message) as raised:
        KVScales.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_scales_of_other_layers_or_heads_are_refused():
    check_shape(some_scales(), layers=3, heads=2)
    with pytest.raises(ValueError, match="of 3 layers, the checkpoint has 4"):
        check_shape(some_scales(), layers=4, heads=2)
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.k_scale has shape \(2,\); .* each of 8 heads"):
        check_shape(some_scales(), layers=3, heads=8)
