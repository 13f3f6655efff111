"""Loading parents and children: dtype, MXFP4, devices; nothing of the folder's own code runs."""

import json
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.released_twin import write_released_twin
from safetensors.torch import load_file, save_file
from torch import multiprocessing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.loading import DtypeName, load_mapped, load_model
from lit_puzzle.model.mxfp4 import expert_weight
from lit_puzzle.serve.checksums import checksums
from lit_puzzle.training.sharding import full, load_for, shard

ASSETS = Path(__file__).parents[2] / "lit_puzzle" / "assets"


def test_mxfp4_experts_come_in_bfloat16_with_each_layers_own_count(tmp_path):
    folder = write_released_twin(tmp_path / "twin")
    model = load_model(folder, "bfloat16", attention="sink_attention")
    checkpoint = Checkpoint(folder)
    for layer, (count, _) in enumerate(checkpoint.blocks):
        experts = model.model.layers[layer].mlp.experts
        assert experts.down_proj.dtype == torch.bfloat16 and len(experts.down_proj) == count
    name = "model.layers.0.mlp.experts.down_proj"
    expected = expert_weight(checkpoint.read(f"{name}_blocks"), checkpoint.read(f"{name}_scales"))
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, expected)


def test_mxfp4_in_another_dtype_is_refused(tmp_path):
    folder = write_released_twin(tmp_path / "twin")
    with pytest.raises(ValueError, match="dequantized to bfloat16; dtype is 'float32'"):
        load_model(folder, "float32")


def test_the_folders_own_code_is_not_run(tmp_path):
    folder = write_released_twin(tmp_path / "twin")
    (folder / "gpt_oss.py").write_text("raise RuntimeError('remote code ran')")
    assert load_model(folder, "bfloat16").config.model_type == "gpt_oss_puzzle"


def test_of_the_generation_configuration_only_tokens_are_taken(tmp_path):
    """TRL and transformers' `generate` fill in from the model what a recipe leaves open."""
    folder = shutil.copytree(ASSETS / "tiny_parent", tmp_path / "parent")
    file = folder / "generation_config.json"
    tokens = json.loads(file.read_text())
    unwanted = {"suppress_tokens": [5, 6], "no_repeat_ngram_size": 2, "min_new_tokens": 30, "num_beams": 3}
    file.write_text(json.dumps(tokens | unwanted))
    for model in (load_model(folder, "float32"), load_mapped(folder, "float32")[0]):
        settings = model.generation_config
        assert settings.eos_token_id == tokens["eos_token_id"] and settings.pad_token_id == tokens["pad_token_id"]
        assert settings.to_diff_dict().keys().isdisjoint(unwanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["tiny_parent", "tiny_child"])
def test_a_mapped_model_is_the_loaded_one(name, dtype):
    loaded = load_model(ASSETS / name, dtype, "sink_attention")
    mapped, waiting = load_mapped(ASSETS / name, dtype, "sink_attention")
    assert any(parameter.is_meta for parameter in mapped.parameters()) == (dtype == "float32")
    waiting.fill(mapped)
    assert_same(mapped, loaded)
    assert mapped.generation_config.to_dict() == loaded.generation_config.to_dict()
    ids = torch.arange(8, 40)[None]
    assert torch.equal(mapped(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_a_mapped_mxfp4_model_is_the_loaded_one(tmp_path):
    folder = write_released_twin(tmp_path / "twin")
    mapped, waiting = load_mapped(folder, "bfloat16")
    for layer in mapped.model.layers:
        waiting.fill(layer)
    assert_same(mapped, load_model(folder, "bfloat16"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("name", ["tiny_parent", "tiny_child"])
def test_a_loaded_model_is_that_of_transformers(name, dtype):
    ours = load_model(ASSETS / name, dtype)
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=getattr(torch, dtype), attn_implementation="eager")
    theirs = load(ASSETS / name, experts_implementation="grouped_mm")
    assert_same(ours, theirs)
    assert [buffer.dtype for buffer in ours.buffers()] == [buffer.dtype for buffer in theirs.buffers()]
    ids = torch.arange(8, 40)[None]
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_weights_of_a_loaded_model_are_its_own(tmp_path):
    folder = shutil.copytree(ASSETS / "tiny_parent", tmp_path / "parent")
    model, before = load_model(folder, "bfloat16"), (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert load_model(folder, "bfloat16").lm_head.weight.any()


def test_double_precision_agrees_with_single():
    ids = torch.arange(8, 40)[None]
    double, single = (
        load_model(ASSETS / "tiny_parent", dtype)(input_ids=ids).logits for dtype in ("float64", "float32")
    )
    assert double.dtype == torch.float64 and 0 < (double - single).abs().max() < 1e-4


def spoil(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


EXPERTS = "model.layers.3.mlp.experts.down_proj"


@pytest.mark.parametrize("load", [load_model, load_mapped])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["lm_head.weight", EXPERTS, "model.layers.2.self_attn.sinks"])
def test_a_missing_tensor_is_never_drawn_and_nan_never_loaded(tmp_path, load, dtype, name):
    def loaded():
        model, waiting = loaded_pair if isinstance(loaded_pair := load(folder, dtype), tuple) else (loaded_pair, None)
        if waiting is not None:
            waiting.fill(model)

    folder = shutil.copytree(ASSETS / "tiny_parent", tmp_path / "parent")
    spoil(folder, lambda tensors: tensors[name].view(-1)[-1].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} has 1 of \d+ values that are not finite"):
        loaded()
    spoil(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"model\.safetensors: missing tensor {name} of shape"):
        loaded()


@pytest.mark.parametrize("load", [load_model, load_mapped])
def test_files_are_compared_with_recorded_checksums(tmp_path, load):
    folder = shutil.copytree(ASSETS / "tiny_parent", tmp_path / "parent")
    with checksums() as sums:
        sums.write(folder)
    load(folder, "bfloat16")
    spoil(folder, lambda tensors: tensors["lm_head.weight"].neg_())
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file of .*SHA256SUMS"):
        load(folder, "bfloat16")


@pytest.mark.slow
def test_what_one_of_two_processes_finds_all_refuse(tmp_path):
    """The rows of the last expert are read by the second process only."""
    folder = shutil.copytree(ASSETS / "tiny_parent", tmp_path / "parent")
    spoil(folder, lambda tensors: tensors[EXPERTS].view(-1)[-1].fill_(float("nan")))
    multiprocessing.spawn(load_broken, (tmp_path,), nprocs=2)
    messages = [(tmp_path / f"said{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1] and f"{EXPERTS} has 1 of 49152 values that are not finite" in messages[0]


def load_broken(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    with pytest.raises(ValueError, match="not finite") as refused:
        load_mapped(folder / "parent", "bfloat16")
    (folder / f"said{rank}").write_text(str(refused.value))
    torch.distributed.destroy_process_group()


def assert_same(mapped, loaded):
    expected = dict(loaded.named_parameters())
    assert {name: parameter.dtype for name, parameter in mapped.named_parameters()} == {
        name: parameter.dtype for name, parameter in expected.items()
    }
    assert all(torch.equal(parameter, expected[name]) for name, parameter in mapped.named_parameters())
    assert not mapped.training


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.slow
def test_two_processes_hold_half_of_a_200_million_model_each(tmp_path, trains):
    """In float32 as loaded, or in bfloat16 as loaded and float32 to be trained."""
    layers, mib = 8, 2**20
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_local_experts": 32, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024}
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**sizes, **heads)).bfloat16()
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(0, 2**14)  # any finite values; quicker than drawing normals
    model.save_pretrained(tmp_path / "big")
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())  # float32 from bfloat16
    assert whole > 4 * 200e6
    last = model.model.layers[-1].mlp.experts.down_proj.detach().float()
    del model, parameter
    multiprocessing.spawn(load_half, (tmp_path, last, trains), nprocs=2)
    for rank in range(2):
        peak = int((tmp_path / f"peak{rank}").read_text())
        assert whole / 2 < peak < whole / 2 + 1.5 * whole / layers + 64 * mib, f"{peak / mib:.0f} MiB"


def load_half(rank, folder, expected, trains):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    before, samples, done = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not done.is_set():
            samples.append(anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model, waiting = load_for(mesh, folder / "big", "bfloat16" if trains else "float32", "sink_attention")
    shard(model, model.model.layers, mesh, waiting, trains)
    done.set()
    watcher.join()
    (folder / f"peak{rank}").write_text(str(max(samples) - before))
    assert torch.equal(full(model.model.layers[-1].mlp.experts.down_proj), expected)
    torch.distributed.destroy_process_group()


def anonymous_bytes():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mxfp4", "float32"])
def test_each_process_converts_its_own_rows_only(tmp_path, kind):
    """Three processes share 8, 5, 3 or 2 experts: MXFP4 to bfloat16, or bfloat16 to float32, each byte read once."""
    folder = write_released_twin(tmp_path / "twin") if kind == "mxfp4" else ASSETS / "tiny_child"
    multiprocessing.spawn(load_rows, (tmp_path, folder, kind), nprocs=3)
    read = [json.loads((tmp_path / f"read{rank}").read_text()) for rank in range(3)]
    checkpoint = Checkpoint(folder)
    expected = [0, 0, 0]
    for name, info in checkpoint.tensors.items():
        if ".mlp.experts." not in name or (kind == "mxfp4" and not name.endswith(("_blocks", "_scales"))):
            continue
        share = -(-info.shape[0] // 3)
        for rank in range(3):
            rows = max(0, min((rank + 1) * share, info.shape[0]) - rank * share)
            expected[rank] += rows * info.num_bytes // info.shape[0]
    assert read == expected and read[0] > read[2] > 0


def load_rows(rank, folder, checkpoint, kind):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    mesh = init_device_mesh("cpu", (3, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dtype: DtypeName = "bfloat16" if kind == "mxfp4" else "float32"
    model, waiting = load_for(mesh, checkpoint, dtype, "sink_attention")
    shard(model.requires_grad_(False), model.model.layers, mesh, waiting)
    assert waiting is not None
    expected = load_model(checkpoint, dtype, "sink_attention")
    with torch.no_grad():
        ids = torch.arange(8, 40)[None]
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    for name, parameter in expected.named_parameters():
        assert torch.equal(full(model.get_parameter(name)), parameter), name
    (folder / f"read{rank}").write_text(json.dumps(waiting.bytes_read))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_one_process_loads_to_the_device_of_its_mesh(tmp_path):
    """On a CPU nothing changes; `meta` stands for a GPU: no weight stays on the CPU."""
    multiprocessing.spawn(load_on_meshes, (tmp_path,), nprocs=1)


def load_on_meshes(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=1)
    child = ASSETS / "tiny_child"
    expected = dict(load_model(child, "float32", "sink_attention").named_parameters())
    for mesh in (None, DeviceMesh("cpu", [0]), DeviceMesh("meta", [0])):
        model, waiting = load_for(mesh, child, "float32", "sink_attention")
        assert waiting is None and not model.training
        found = dict(model.named_parameters())
        assert found.keys() == expected.keys()
        if mesh is not None and mesh.device_type == "meta":
            assert {tensor.device.type for tensor in (*found.values(), *model.buffers())} == {"meta"}
        else:
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_row_that_one_process_converts_is_refused_by_all(tmp_path):
    folder = shutil.copytree(ASSETS / "tiny_parent", tmp_path / "parent")
    spoil(folder, lambda tensors: tensors[EXPERTS].view(-1)[-1].fill_(float("nan")))
    multiprocessing.spawn(fill_broken, (tmp_path,), nprocs=2)
    messages = [(tmp_path / f"said{rank}").read_text() for rank in range(2)]
    assert messages[0] == messages[1] and f"{EXPERTS} has 1 of 49152 values that are not finite" in messages[0]


def fill_broken(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    model, waiting = load_mapped(folder / "parent", "float32")  # converted when its layers are sharded
    with pytest.raises(ValueError, match="not finite") as refused:
        shard(model, model.model.layers, mesh, waiting)
    (folder / f"said{rank}").write_text(str(refused.value))
    torch.distributed.destroy_process_group()
