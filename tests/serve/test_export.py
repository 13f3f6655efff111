"""Export: a complete folder that computes the same as its child and loads with transformers alone."""

import json
import os
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from helpers.exports import made_up_scales
from helpers.file_reads import count_reads
from helpers.released_twin import twin_tensors, write_released_twin
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_puzzle.cli import main
from lit_puzzle.model.checkpoint import Checkpoint, fingerprint
from lit_puzzle.model.family import GPT_OSS
from lit_puzzle.serve.configs import puzzle_config
from lit_puzzle.serve.export import export
from lit_puzzle.serve.exported_folder import write_folder
from lit_puzzle.serve.settings import Storage
from lit_puzzle.serve.tokenizer_files import generation_settings, stop_tokens

ASSETS = Path(__file__).parents[2] / "lit_puzzle" / "assets"
CHILD, WORDS = ASSETS / "tiny_child", ASSETS / "tiny_parent"
PROMPT = torch.randint(8, 128, (2, 40), generator=torch.Generator().manual_seed(0))


def logits_of(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(PROMPT).logits


def test_folder_is_complete_and_computes_the_same(tmp_path: Path) -> None:
    results = export(tmp_path, CHILD)
    folder = tmp_path / "model"
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in CHILD.iterdir()} | {"README.md", "plan.png", "SHA256SUMS"}
    for name in names - {"README.md", "plan.png", "SHA256SUMS", "config.json", "generation_config.json"}:
        source = GPT_OSS.child.modeling_file if name == "gpt_oss.py" else CHILD / name
        assert (folder / name).read_bytes() == source.read_bytes(), name
    assert torch.equal(logits_of(folder), logits_of(CHILD))
    assert fingerprint(folder) == fingerprint(CHILD)
    config, before = (json.loads((path / "config.json").read_text()) for path in (folder, CHILD))
    assert config == before and not config.keys() & {"per_layer_config", "quantization_config", "rope_scaling"}
    assert results["files"] == len(names) and results["parameters"] == 1_449_336
    assert (results["mxfp4_layers"], results["kv_scale_layers"], results["rounded_experts"]) == (0, 0, 0)


def test_every_checkpoint_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = count_reads(monkeypatch)
    export(tmp_path, CHILD)
    opened = {path.parent.name: count for path, count in reads.items() if path.name == "model.safetensors"}
    assert opened == {CHILD.name: 1, ".model.partial": 1}
    assert reads[CHILD / "plan.json"] == 2  # once for its identity


def test_checksums_are_those_of_coreutils(tmp_path: Path) -> None:
    export(tmp_path, CHILD)
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    output = subprocess.run(check, cwd=tmp_path / "model", capture_output=True, text=True, check=True).stdout
    listed = {line.removesuffix(": OK") for line in output.splitlines()}
    assert listed == {path.name for path in (tmp_path / "model").iterdir()} - {"SHA256SUMS"}
    with (tmp_path / "model" / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x55")
    assert subprocess.run(check, cwd=tmp_path / "model", capture_output=True, check=False).returncode == 1


def test_shards_have_an_index_and_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_puzzle.serve.export.write_folder", partial(write_folder, max_shard_bytes=1_000_000))
    export(tmp_path, CHILD)
    folder = tmp_path / "model"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(folder.glob("*.safetensors"))) > 3
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    assert torch.equal(logits_of(folder), logits_of(CHILD))


BARE = """
import importlib.util, os, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("lit_puzzle") is None
try:
    import lit_puzzle
    sys.exit("lit_puzzle can be imported")
except ModuleNotFoundError:
    pass
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True, attn_implementation="eager").eval()
assert type(model).__name__ == "GptOssPuzzleForCausalLM", type(model)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
chat = tokenizer.apply_chat_template(
    [{"role": "user", "content": "sorting"}], add_generation_prompt=True, reasoning_effort="high", return_dict=True,
    return_tensors="pt",
)
completion = model.generate(**chat, max_new_tokens=40, do_sample=False)
with torch.no_grad():
    torch.save((model(torch.load(sys.argv[3])).logits, completion, model.generation_config.eos_token_id), sys.argv[3])
assert not any(name.partition(".")[0] == "lit_puzzle" for name in sys.modules)
"""


def bare_site_packages(folder: Path) -> Path:
    """Links to every installed package but ours (and the files that find it)."""
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "lit_puzzle" not in entry.name and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.slow
def test_loads_where_lit_puzzle_cannot_be_imported(tmp_path: Path) -> None:
    export(tmp_path / "run", CHILD)
    folder = tmp_path / "run" / "model"
    torch.save(PROMPT, tmp_path / "exchange.pt")
    site = bare_site_packages(tmp_path / "site")
    command = [sys.executable, "-I", "-S", "-c", BARE, str(site), str(folder), str(tmp_path / "exchange.pt")]
    clean = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **clean}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits, completion, stops = torch.load(tmp_path / "exchange.pt")
    assert torch.equal(logits, logits_of(CHILD))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(CHILD), AutoTokenizer.from_pretrained(CHILD)
    prompt = "<|start|>system<|message|>Reasoning: high<|end|><|start|>user<|message|>sorting<|end|><|start|>assistant"
    pairs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    assert torch.equal(completion, model.generate(**pairs, max_new_tokens=40, do_sample=False))
    assert stops == [5, 6, 0]


def test_kv_scales_come_with_the_weights(tmp_path: Path) -> None:
    made_up_scales(CHILD, bf16_layers=(2, 3)).save(tmp_path / "scales")
    results = export(tmp_path / "run", CHILD, kv_scales=tmp_path / "scales")
    exported = Checkpoint(tmp_path / "run" / "model")
    assert results["kv_scale_layers"] == 4
    for layer in (0, 1, 4, 5):
        tensors = exported.layer(layer)
        assert tensors["self_attn.k_scale"].dtype == torch.float32 and tensors["self_attn.k_scale"].shape == ()
        assert tensors["self_attn.k_scale"] == torch.tensor((1.0 + layer) / 448)
        assert tensors["self_attn.v_scale"] == torch.tensor((2.0 + layer) / 448)
    assert "self_attn.k_scale" not in exported.layer(2)
    assert torch.equal(logits_of(exported.folder), logits_of(CHILD))
    card = (exported.folder / "README.md").read_text()
    assert "method amax over 100 tokens, rounding none" in card and "Layers 2, 3 have no KV scales" in card
    assert "--kv-cache-dtype fp8" in card


def test_scales_replace_those_of_the_checkpoint(tmp_path: Path) -> None:
    twin = write_released_twin(tmp_path / "twin")
    made_up_scales(twin).save(tmp_path / "scales")
    export(tmp_path / "new", twin, kv_scales=tmp_path / "scales", tokenizer=WORDS)
    assert Checkpoint(tmp_path / "new" / "model").layer(3)["self_attn.k_scale"] == torch.tensor(4 / 448)
    results = export(tmp_path / "old", twin, tokenizer=WORDS)
    assert results["kv_scale_layers"] == results["mxfp4_layers"] == 6
    assert Checkpoint(tmp_path / "old" / "model").layer(2)["self_attn.k_scale"] == torch.tensor(0.25)
    assert "copied from the checkpoint" in (tmp_path / "old" / "model" / "README.md").read_text()


def test_the_released_format_is_exported_bit_for_bit_with_new_config_keys(tmp_path: Path) -> None:
    twin, tensors = write_released_twin(tmp_path / "twin"), twin_tensors()
    export(tmp_path / "run", twin, tokenizer=WORDS)
    exported = Checkpoint(tmp_path / "run" / "model")
    assert exported.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(exported.read(name), tensor), name
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["rope_parameters"]["factor"] == 56.0 and config["rope_parameters"]["rope_theta"] == 150000
    assert config["quantization_config"]["quant_method"] == "mxfp4" and config["dtype"] == "bfloat16"
    assert torch.equal(logits_of(exported.folder), logits_of(twin))
    loaded = AutoModelForCausalLM.from_pretrained(exported.folder)
    assert loaded.config.rope_parameters == config["rope_parameters"]
    stops = json.loads((exported.folder / "generation_config.json").read_text())
    assert stops["eos_token_id"] == [2, 3, 5, 0, 6] and stops["do_sample"] is True


def test_another_dtype_rounds_every_tensor_once(tmp_path: Path) -> None:
    export(tmp_path, CHILD, storage=Storage(dtype="float32"))
    exported, before = Checkpoint(tmp_path / "model"), Checkpoint(CHILD)
    assert {info.dtype for info in exported.tensors.values()} == {"F32"}
    assert all(torch.equal(exported.read(name), before.read(name).float()) for name in before.tensors)
    assert exported.config["dtype"] == "float32"


def write_gpt_oss_tokenizer(folder: Path) -> Path:
    """Write a tokenizer with the stop tokens of gpt-oss under their ids."""
    ids = {"<|endoftext|>": 199999, "<|return|>": 200002, "<|start|>": 200006, "<|call|>": 200012}
    added = [{"id": number, "content": word, "special": True} for word, number in ids.items()]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|return|>", "pad_token": "<|endoftext|>"}))
    return folder


def test_stop_tokens_are_the_tokenizers_own(tmp_path: Path) -> None:
    words = write_gpt_oss_tokenizer(tmp_path / "words")
    assert stop_tokens(words) == [200002, 199999, 200012]
    assert stop_tokens(CHILD) == [5, 0, 6]
    config = {"model_type": "gpt_oss", "vocab_size": 201089, "eos_token_id": 200002}  # not the size of gpt-oss
    assert generation_settings(tmp_path, words, config)["eos_token_id"] == [200002, 199999, 200012]
    small = {"model_type": "gpt_oss", "vocab_size": 128, "eos_token_id": None}
    with pytest.raises(ValueError, match=r"\[200002, 199999, 200012\]; at least one is needed, and all must be below"):
        generation_settings(tmp_path, words, small)
    (words / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"are \[\]; at least one is needed"):
        generation_settings(tmp_path, words, small)


def test_parent_itself_becomes_a_child_of_its_own_blocks(tmp_path: Path) -> None:
    config = puzzle_config(Checkpoint(WORDS))
    assert config["block_configs"][1] == {"num_local_experts": 16, "sliding_window": None}
    export(tmp_path, WORDS)
    assert torch.equal(logits_of(tmp_path / "model"), logits_of(WORDS))


def test_recipe_runs_and_a_finished_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up_scales(CHILD).save(tmp_path / "scales")
    words = ["run", "recipes/export.yaml", f"--run_dir={tmp_path / 'run'}", f"--kv_scales={tmp_path / 'scales'}"]
    main(words)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["results"]["kv_scale_layers"] == 6
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["card"]["license"] == "apache-2.0"
    before = (tmp_path / "run" / "model" / "SHA256SUMS").read_bytes()
    with pytest.raises(SystemExit):
        main(words)
    assert "is complete; give --overwrite" in capsys.readouterr().err
    (tmp_path / "run" / "model" / "stray.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main([*words, "--overwrite"])
    assert "contains model/stray.txt, which this run has not made" in capsys.readouterr().err
    (tmp_path / "run" / "model" / "stray.txt").unlink()
    main([*words, "--overwrite"])
    assert (tmp_path / "run" / "model" / "SHA256SUMS").read_bytes() == before  # the plot too
