"""Input that an export refuses, and a full disk, which leaves no folder that looks complete or is half-written."""

import json
import multiprocessing
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.exports import made_up_scales
from helpers.released_twin import write_released_twin
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lit_puzzle.cli import main
from lit_puzzle.kv_cache.scales import KVScales
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import GPT_OSS
from lit_puzzle.serve.export import export
from lit_puzzle.serve.settings import Storage, Upload

ASSETS = Path(__file__).parents[2] / "lit_puzzle" / "assets"
CHILD, WORDS = ASSETS / "tiny_child", ASSETS / "tiny_parent"


@pytest.fixture
def child(tmp_path: Path) -> Path:
    """A copy of the tiny child, to be damaged."""
    return Path(shutil.copytree(CHILD, tmp_path / "child"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_pickles_are_refused(tmp_path: Path, child: Path) -> None:
    (child / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pickled'\ntR.")
    with pytest.warns(UserWarning, match=r"pytorch_model\.bin is ignored"):
        export(tmp_path / "beside", child)
    assert not (tmp_path / "beside" / "model" / "pytorch_model.bin").exists()
    (child / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pickles only \(pytorch_model\.bin\): loading one runs code"):
        export(tmp_path / "run", child)
    assert not (tmp_path / "run").exists() and not Path("pickled").exists()


def test_weights_with_nan_are_refused(tmp_path: Path, child: Path) -> None:
    tensors = load_file(child / "model.safetensors")
    tensors["model.layers.2.mlp.router.weight"][1, 2] = float("nan")
    save_file(tensors, child / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model\.safetensors: model\.layers\.2\.mlp\.router\.weight has 1 of 768 values"
    ):
        export(tmp_path / "run", child)
    assert not (tmp_path / "run" / "model").exists()


def test_checkpoint_that_is_not_the_exported_one_is_refused(tmp_path: Path, child: Path) -> None:
    export(tmp_path / "first", child)
    exported = tmp_path / "first" / "model"
    export(tmp_path / "second", exported)
    tensors = load_file(exported / "model.safetensors")
    tensors["lm_head.weight"][1, 2] += 1
    save_file(tensors, exported / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file of .*SHA256SUMS"):
        export(tmp_path / "third", exported)


def test_code_of_the_checkpoint_is_neither_run_nor_copied(tmp_path: Path, child: Path) -> None:
    mark = tmp_path / "executed"
    for name in ("gpt_oss.py", "modeling_evil.py"):
        (child / name).write_text(f"open({str(mark)!r}, 'w')\n")
    edit_json(child / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    export(tmp_path / "run", child)
    folder = tmp_path / "run" / "model"
    assert not mark.exists()
    assert [path.name for path in folder.glob("*.py")] == ["gpt_oss.py"]
    assert (folder / "gpt_oss.py").read_bytes() == GPT_OSS.child.modeling_file.read_bytes()
    assert json.loads((folder / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"].startswith("gpt_oss.")


def test_code_that_the_config_names_is_dropped(tmp_path: Path, child: Path) -> None:
    """transformers would download a kernel of that name, or a pipeline from that repository, and run it."""
    named = {"attn_implementation": "someone/kernel", "experts_implementation": "someone/kernel"}
    pipelines = {"chat": {"impl": "someone/else--chat.Pipe", "pt": ["AutoModelForCausalLM"], "type": "text"}}
    edit_json(child / "config.json", **named, custom_pipelines=pipelines)
    assert AutoConfig.from_pretrained(child)._attn_implementation == "someone/kernel"
    export(tmp_path / "run", child)
    assert "someone" not in (tmp_path / "run" / "model" / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path / "run" / "model")._attn_implementation != "someone/kernel"


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path: Path, child: Path) -> None:
    tensors = load_file(child / "model.safetensors")
    tensors["model.norm.weight"][0] = 70_000.0  # float16 ends at 65,504
    save_file(tensors, child / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight has values that torch\.float16 cannot hold"):
        export(tmp_path / "run", child, storage=Storage(dtype="float16"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["inputs.json"]
    export(tmp_path / "run", child, storage=Storage(dtype="float32"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            r"has no tokenizer\.json; an exported folder needs it",
        ),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template"),
        (
            lambda folder: edit_json(
                folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Words", None]}
            ),
            "names code in the folder",
        ),
        (
            lambda folder: edit_json(folder / "config.json", per_layer_config={"0": {"num_local_experts": 3}}),
            "per_layer_config means",
        ),
        (
            lambda folder: edit_json(
                folder / "config.json", rope_parameters={"rope_type": "yarn", "original_max_position_embeddings": 4096}
            ),
            "factor of rope_parameters must be a finite number above 0",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "truncated or not a safetensors file"),
        (lambda folder: edit_json(folder / "config.json", model_type="llama"), "model_type 'llama' is not supported"),
    ],
    ids=["tokenizer", "template", "code", "per_layer_config", "yarn", "truncated", "other"],
)
def test_incomplete_and_contradictory_checkpoints_are_refused(
    tmp_path: Path, child: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(child)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "run", child)
    assert not (tmp_path / "run").exists()


def without(scales: KVScales, layer: int) -> KVScales:
    return replace(scales, layers=(*scales.layers[:layer], None, *scales.layers[layer + 1 :]))


def test_a_layer_with_full_attention_must_have_scales(tmp_path: Path) -> None:
    without(made_up_scales(CHILD), 1).save(tmp_path / "scales")
    with pytest.raises(ValueError, match="layer 1 has full attention and no KV scale"):
        export(tmp_path / "run", CHILD, kv_scales=tmp_path / "scales")
    replace(made_up_scales(CHILD), layers=made_up_scales(CHILD).layers[:4]).save(tmp_path / "few")
    with pytest.raises(ValueError, match="KV scales are of 4 layers, the checkpoint has 6"):
        export(tmp_path / "run", CHILD, kv_scales=tmp_path / "few")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.3.self_attn.v_scale"), r"layers\.3\.self_attn\.v_scale is missing"),
        (lambda tensors: tensors["model.layers.2.self_attn.k_scale"].zero_(), r"layers\.2\.self_attn\.k_scale is 0\.0"),
        (lambda tensors: tensors["model.layers.2.self_attn.k_scale"].fill_(torch.inf), r"k_scale is inf"),
    ],
    ids=["missing", "zero", "infinite"],
)
def test_damaged_scales_are_refused(
    tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    made_up_scales(CHILD).save(tmp_path / "scales")
    tensors = load_file(tmp_path / "scales" / "kv_scales.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "scales" / "kv_scales.safetensors")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "run", CHILD, kv_scales=tmp_path / "scales")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("amax", [0.0, -1.0])
def test_scales_with_an_invalid_amax_are_refused(tmp_path: Path, amax: float) -> None:
    made_up_scales(CHILD).save(tmp_path / "scales")
    content = json.loads((tmp_path / "scales" / "kv_scales.json").read_text())
    content["layers"][0]["k_amax"] = amax
    (tmp_path / "scales" / "kv_scales.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"amax of model\.layers\.0\.self_attn\.k_scale"):
        export(tmp_path / "run", CHILD, kv_scales=tmp_path / "scales")


def test_scales_of_another_child_are_refused(tmp_path: Path) -> None:
    made_up_scales(WORDS).save(tmp_path / "scales")
    with pytest.raises(ValueError, match="KV scales are of checkpoint"):
        export(tmp_path / "run", CHILD, kv_scales=tmp_path / "scales")


def test_zero_scales_inside_a_checkpoint_are_refused(tmp_path: Path) -> None:
    twin = write_released_twin(tmp_path / "twin")
    for path in twin.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.layers.4.self_attn.k_scale" in tensors:
            tensors["model.layers.4.self_attn.k_scale"].zero_()
            save_file(tensors, path)
    with pytest.raises(ValueError, match=r"model\.layers\.4\.self_attn\.k_scale is 0\.0; it must be positive"):
        export(tmp_path / "run", twin, tokenizer=WORDS)


def test_an_existing_folder_is_left_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="already exists; remove it or choose another folder"):
        export(tmp_path / "run", CHILD)
    with pytest.raises(SystemExit):
        main(["run", "recipes/export.yaml", f"--run_dir={tmp_path / 'run'}", "--kv_scales=null"])
    assert "is not empty and not a run folder" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {"model", "mine.txt", "inputs.json"}


@pytest.mark.parametrize(
    ("repository", "offline", "message"),
    [
        ("no-owner", False, "name a repository as OWNER/NAME"),
        ("a/b/c", False, "OWNER/NAME"),
        ("me/mine", False, "needs a login"),
        ("me/mine", True, "HF_HUB_OFFLINE is set"),
    ],
)
def test_an_upload_is_checked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: str, offline: bool, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "run", CHILD, upload=Upload(repository))
    assert not (tmp_path / "run").exists()


def test_an_upload_that_fails_leaves_the_complete_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload goes to a port where nobody listens; the folder is complete before it starts."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(Exception, match="Connection refused"):
        export(tmp_path / "run", CHILD, upload=Upload("me/mine"))
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "run" / "model", check=True)


def export_on_a_small_disk(run_dir: Path, checkpoint: Path, largest_file: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    export(run_dir, checkpoint)


def test_nothing_is_left_when_writing_stops_in_the_middle(tmp_path: Path) -> None:
    run = tmp_path / "run"
    size = (CHILD / "model.safetensors").stat().st_size
    arguments = (run, CHILD, size // 2)
    process = multiprocessing.get_context("fork").Process(target=export_on_a_small_disk, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 1
    assert [path.name for path in run.iterdir()] == ["inputs.json"]
    export(run, CHILD)
    assert Checkpoint(run / "model").num_layers == 6


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the files before the weights and no more."""
    place = tmp_path / "disk"
    place.mkdir()
    size = (CHILD / "model.safetensors").stat().st_size + 60_000
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_after_a_full_disk_the_command_can_be_rerun(small_disk: Path, tmp_path: Path) -> None:
    words = ["run", "recipes/export.yaml", f"--run_dir={small_disk / 'run'}", "--kv_scales=null"]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert not (small_disk / "run" / "model").exists()
    subprocess.run(["mount", "-o", "remount,size=16M", str(small_disk)], check=True)
    main(words)
    assert json.loads((small_disk / "run" / "run.json").read_text())["results"]["files"] > 5
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=small_disk / "run" / "model", check=True)
