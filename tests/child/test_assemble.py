"""Assembling: identity is the parent bit for bit, MXFP4 stays MXFP4, each file is read once, memory is a buffer."""

import errno
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.anonymous_memory import peak_bytes
from helpers.file_reads import count_reads
from helpers.released_twin import TWIN_BLOCKS, twin_tensors, write_released_twin
from helpers.small_children import PROMPT, logits_of, save_plan
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssForCausalLM

from lit_puzzle.child.assemble import assemble
from lit_puzzle.child.settings import ManualPlan
from lit_puzzle.library.library import Candidate, Library, candidate_name, parent_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import GPT_OSS
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig
from lit_puzzle.model.layout import tensor_shapes
from lit_puzzle.model.mxfp4 import expert_weight
from lit_puzzle.model.writer import write_checkpoint
from lit_puzzle.spec import BlockSpec, Plan


def test_identity_child_is_the_parent_bit_for_bit(tmp_path: Path, parent: Path) -> None:
    results = assemble(tmp_path / "run", parent)
    child, original = Checkpoint(tmp_path / "run" / "child"), Checkpoint(parent)
    assert child.tensors.keys() == original.tensors.keys()
    for name, info in original.tensors.items():
        assert child.tensors[name].dtype == info.dtype
        assert torch.equal(child.read(name).view(torch.uint8), original.read(name).view(torch.uint8)), name
    assert torch.equal(logits_of(tmp_path / "run" / "child"), logits_of(parent))
    assert {results[f"{name}/ratio"] for name in ("parameters", "weight_bytes", "kv_values_128k")} == {1.0}


def test_child_equals_the_parent_with_masked_router_logits(
    tmp_path: Path, parent: Path, tiny_model: GptOssForCausalLM
) -> None:
    kept = [(0, 1, 2, 3, 4, 5, 6, 7), (1, 4, 6), (0, 7), (2, 3, 5, 6)]
    windows = [8, None, 8, None]
    plan = save_plan(tmp_path, parent, list(zip(kept, windows, strict=True)))
    results = assemble(tmp_path / "run", parent, plan=plan)
    for layer, stays in zip(tiny_model.model.layers, kept, strict=True):
        layer.mlp.router.bias.data[[index for index in range(8) if index not in stays]] = float("-inf")
    with torch.no_grad():
        expected = tiny_model(PROMPT).logits
    torch.testing.assert_close(logits_of(tmp_path / "run" / "child"), expected, rtol=1e-5, atol=1e-5)
    assert results["experts/child"] == 17 and results["experts/parent"] == 32
    assert Plan.load(tmp_path / "run" / "child" / "plan.json") == Plan.load(plan)


def test_windows_change_the_config_and_the_answers(tmp_path: Path, parent: Path) -> None:
    results = assemble(tmp_path / "run", parent, manual=ManualPlan(windows={1: 4, 2: 4}))
    child = tmp_path / "run" / "child"
    assert Checkpoint(child).blocks == [(8, 8), (8, 4), (8, 4), (8, None)]
    difference = (logits_of(child) - logits_of(parent)).abs().amax(-1)
    assert difference[:, :4].max() < 1e-5 < difference[:, 8:].min()
    assert results["full_attention_layers/child"] == 1
    per_token = 2 * 2 * 8
    assert results["kv_values_128k/child"] == per_token * (8 + 4 + 4 + 131072)
    assert results["kv_values_128k/parent"] == per_token * (8 + 131072 + 8 + 131072)


def test_twin_pruned_further_keeps_its_mxfp4_bytes_and_kv_scales(tmp_path: Path) -> None:
    twin, tensors = write_released_twin(tmp_path / "twin"), twin_tensors()
    kept = [(0, 2, 5), (0, 1, 2, 3, 4, 5, 6, 7), (1, 7), (0, 3), (3,), (1, 2, 3)]
    windows = [4, 16, 4, 8, 4, None]
    plan = save_plan(tmp_path, twin, list(zip(kept, windows, strict=True)))
    assemble(tmp_path / "run", twin, plan=plan)
    child = Checkpoint(tmp_path / "run" / "child")
    assert child.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        rows = ".experts." in name or ".router." in name
        expected = tensor[list(kept[int(name.split(".")[2])])] if rows else tensor
        assert child.tensors[name].shape == expected.shape
        assert torch.equal(child.read(name), expected), name
    assert torch.equal(child.layer(2)["self_attn.k_scale"], torch.tensor(0.25))


def test_transformers_dequantizes_the_twin_child_to_our_values(tmp_path: Path) -> None:
    twin = write_released_twin(tmp_path / "twin")
    blocks = [(tuple(range(0, b["num_local_experts"] or 0, 2)), b["sliding_window"]) for b in TWIN_BLOCKS]
    assemble(tmp_path / "run", twin, plan=save_plan(tmp_path, twin, blocks))
    folder = tmp_path / "run" / "child"
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in range(6):
        tensors = Checkpoint(folder).layer(layer)
        for name in ("gate_up_proj", "down_proj"):
            ours = expert_weight(tensors[f"mlp.experts.{name}_blocks"], tensors[f"mlp.experts.{name}_scales"])
            assert torch.equal(model.model.layers[layer].mlp.experts.get_parameter(name), ours)
    assert model.config.rope_parameters["factor"] == 56.0 and model.config.max_position_embeddings == 229376
    assert model(PROMPT).logits.isfinite().all()


def test_a_second_run_replaces_the_child(tmp_path: Path, parent: Path) -> None:
    for window in (4, 2):
        assemble(tmp_path / "run", parent, manual=ManualPlan(windows={1: window}))
        assert Checkpoint(tmp_path / "run" / "child").blocks[1] == (8, window)


def test_every_file_is_read_once(tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are opened once, the child's to check it; JSON is read, and once more for the identity of an input."""
    checkpoint = Checkpoint(parent)
    own, library = parent_blocks(checkpoint.config), tmp_path / "library"
    block = BlockSpec((0, 2), 8)
    layers = [[Candidate("parent", spec)] for spec in own]
    layers[0].append(Candidate(candidate_name(own[0], block), block, "layer0.safetensors"))
    library.mkdir()
    save_file({"mlp.router.bias": torch.tensor([3.0, 4.0])}, library / "layer0.safetensors")
    Library(checkpoint.fingerprint(), 8, checkpoint.config, tuple(map(tuple, layers))).save(library)
    plan = save_plan(tmp_path, parent, [((0, 2), 8), *((spec.experts, spec.window_tokens) for spec in own[1:])])
    reads = count_reads(monkeypatch)
    assemble(tmp_path / "run", parent, plan=plan, library=library)
    child = tmp_path / "run" / "child"
    weights = [library / "layer0.safetensors", *(folder / "model.safetensors" for folder in (parent, child))]
    assert [reads[path] for path in weights] == [1] * 3
    assert [reads[path] for path in (plan, library / "library.json")] == [2, 3]  # parsed, and hashed as an input
    assert Checkpoint(child).read("model.layers.0.mlp.router.bias").tolist() == [3.0, 4.0]


def test_folder_holds_what_a_child_needs(tmp_path: Path, parent: Path, tiny_model: GptOssForCausalLM) -> None:
    assemble(tmp_path / "run", parent, manual=ManualPlan(windows={1: 4}))
    child = tmp_path / "run" / "child"
    assert sorted(path.name for path in child.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "generation_lengths.json",
        "gpt_oss.py",
        "model.safetensors",
        "plan.json",
        "tokenizer.json",
    ]
    assert (child / "gpt_oss.py").read_bytes() == GPT_OSS.child.modeling_file.read_bytes()
    assert (child / "tokenizer.json").read_text() == "content of tokenizer.json"
    blocks = Plan.load(child / "plan.json").block_configs()
    expected = GptOssPuzzleConfig.from_parent(tiny_model.config, blocks).to_dict()
    read = GptOssPuzzleConfig.from_pretrained(child).to_dict()
    same = ("block_configs", "layer_types", "rope_parameters", "architectures", "model_type", "dtype", "eos_token_id")
    assert {key: read[key] for key in same} == {key: expected[key] for key in same}


WITHOUT_US = """
import sys, torch
from transformers import AutoModelForCausalLM
sys.path = [entry for entry in sys.path if entry]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, attn_implementation="eager").eval()
assert not any(name == "lit_puzzle" or name.startswith("lit_puzzle.") for name in sys.modules)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_child_loads_with_transformers_alone(tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assemble(tmp_path / "run", parent, manual=ManualPlan(windows={1: 4}))
    torch.save(PROMPT, tmp_path / "exchange.pt")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-P", "-c", WITHOUT_US, str(tmp_path / "run" / "child"), str(tmp_path / "exchange.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "exchange.pt"), logits_of(tmp_path / "run" / "child"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"manual": ManualPlan(windows={4: 8})}, r"windows names layers \[4\]; the parent has layers 0\.\.3"),
        ({"manual": ManualPlan(windows={0: 16})}, "layer 0 the window 16, wider"),
        ({"manual": ManualPlan(windows={1: 1})}, "sliding_window=1"),
        ({"rope_factor": 0.0}, "rope_factor must be above 0"),
        ({"plan": Path("plan.json"), "manual": ManualPlan(windows={1: 4})}, "exclude each other"),
    ],
)
def test_contradictory_settings_are_refused(tmp_path: Path, parent: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(tmp_path / "run", parent, **change)
    assert not (tmp_path / "run" / "child").exists()


def test_parent_is_never_replaced_by_its_child(tmp_path: Path, parent: Path) -> None:
    assemble(tmp_path / "run", parent)
    with pytest.raises(ValueError, match="replaced by its own child"):
        assemble(tmp_path / "run", tmp_path / "run" / "child")
    assert Checkpoint(tmp_path / "run" / "child").num_layers == 4


def write_plain_parent(folder: Path, layers: int, inner: int) -> Path:
    """A bf16 parent of 8 experts, and a plan that keeps every other one, so that its rows have to be copied."""
    stock = {"model_type": "gpt_oss", "num_hidden_layers": layers, "num_local_experts": 8, "sliding_window": 8}
    sizes = {"hidden_size": 256, "intermediate_size": inner, "head_dim": 8, "num_attention_heads": 2, "vocab_size": 64}
    config: dict[str, Any] = stock | sizes | {"num_key_value_heads": 1, "num_experts_per_tok": 2}
    config |= {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(config)
    tensors = ((name, torch.zeros(shape, dtype=torch.bfloat16)) for name, shape in shapes.items())
    write_checkpoint(folder, {name: ("BF16", shape) for name, shape in shapes.items()}, tensors, 30_000_000)
    save_plan(folder, folder, [((0, 2, 4, 6), None if layer % 2 else 8) for layer in range(layers)])
    return folder


def not_by_kernel(*arguments: int) -> int:
    raise OSError(errno.EXDEV, "another file system")


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.slow
def test_memory_is_a_buffer_whatever_the_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_kernel: bool
) -> None:
    """A row of gate_up is 256 x 2 x inner x 2 bytes, the largest run of this plan: 1 MB, and 4 MB when wide."""
    if not by_kernel:
        monkeypatch.setattr(os, "copy_file_range", not_by_kernel)
    peaks: dict[str, int] = {}
    for name, layers, inner in (("shallow", 3, 1024), ("deep", 9, 1024), ("wide", 3, 4096)):
        parent = write_plain_parent(tmp_path / name, layers, inner)
        work = partial(assemble, parent / "run", parent, plan=parent / "plan.json")
        peaks[name] = peak_bytes(work)
    print(f"anonymous bytes above the start: {peaks}")
    row, slack = 1 << 20, 2_500_000  # values are checked in a buffer, whoever copies
    assert peaks["shallow"] <= row + slack and peaks["deep"] <= row + slack
    assert peaks["wide"] <= 4 * row + slack
    assert peaks["wide"] >= 2 * row  # the measurement sees the buffer
