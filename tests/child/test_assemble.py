"""Assembling: identity is the parent bit for bit, MXFP4 stays MXFP4, the child loads without us, nothing is held."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.anonymous_memory import peak_bytes
from helpers.released_twin import TWIN_BLOCKS, twin_tensors, write_released_twin
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from lit_puzzle.child import assemble as stage
from lit_puzzle.child.assemble import assemble, child_config, generation_config, write_child
from lit_puzzle.importance.importance_file import Importance
from lit_puzzle.model.checkpoint import Checkpoint, fingerprint
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig
from lit_puzzle.model.layout import tensor_shapes
from lit_puzzle.model.mxfp4 import expert_weight
from lit_puzzle.model.writer import write_checkpoint
from lit_puzzle.spec import BlockSpec, Plan

PROMPT = torch.randint(128, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def parent(tmp_path: Path, tiny_model: GptOssForCausalLM) -> Path:
    tiny_model.save_pretrained(tmp_path / "parent")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_lengths.json", "README.md"):
        (tmp_path / "parent" / name).write_text(f"content of {name}")
    return tmp_path / "parent"


def save_plan(folder: Path, parent: Path, blocks: list[tuple[tuple[int, ...], int | None]]) -> Path:
    plan = Plan(fingerprint(parent), 8, tuple(BlockSpec(*block) for block in blocks))
    plan.save(folder / "plan.json")
    return folder / "plan.json"


def save_importance(folder: Path, parent: Path, scores: list[list[float]]) -> Path:
    folder.mkdir()
    Importance(fingerprint(parent), "hand", 1, tuple(torch.tensor(row) for row in scores)).save(folder)
    return folder


def logits_of(folder: Path, **options: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()
    with torch.no_grad():
        return model(PROMPT).logits


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
    results = assemble(tmp_path / "run", parent, windows={1: 4, 2: 4})
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


def test_plan_from_importance_keeps_the_best_and_breaks_ties_downwards(tmp_path: Path, parent: Path) -> None:
    scores = [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1], [0, 9, 0, 9, 0, 9, 0, 9]]
    importance = save_importance(tmp_path / "importance", parent, [[float(s) for s in row] for row in scores])
    assemble(tmp_path / "run", parent, importance=importance, experts=[3, 3, 3, 5], windows={3: 4})
    plan = Plan.load(tmp_path / "run" / "child" / "plan.json")
    assert [block.experts for block in plan.blocks] == [(5, 6, 7), (0, 1, 2), (0, 1, 2), (0, 1, 3, 5, 7)]
    assert [block.window_tokens for block in plan.blocks] == [8, None, 8, 4]
    assemble(tmp_path / "run", parent, importance=importance, experts=4)  # again, over the child that is there
    assert [count for count, _ in Checkpoint(tmp_path / "run" / "child").blocks] == [4, 4, 4, 4]


def test_folder_holds_what_a_child_needs(tmp_path: Path, parent: Path, tiny_model: GptOssForCausalLM) -> None:
    assemble(tmp_path / "run", parent, windows={1: 4})
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
    assert (child / "gpt_oss.py").read_bytes() == stage.MODELING_FILE.read_bytes()
    assert (child / "tokenizer.json").read_text() == "content of tokenizer.json"
    blocks = Plan.load(child / "plan.json").block_configs()
    expected = GptOssPuzzleConfig.from_gpt_oss(tiny_model.config, blocks).to_dict()
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


def test_child_loads_with_transformers_alone(tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assemble(tmp_path / "run", parent, windows={1: 4})
    torch.save(PROMPT, tmp_path / "exchange.pt")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-P", "-c", WITHOUT_US, str(tmp_path / "run" / "child"), str(tmp_path / "exchange.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "exchange.pt"), logits_of(tmp_path / "run" / "child"))


def test_shards_of_a_child_load_in_transformers(tmp_path: Path, parent: Path) -> None:
    source = Checkpoint(parent)
    plan = Plan.load(save_plan(tmp_path, parent, [((0, 1, 5), 8), ((0, 2), None), ((1, 2), 4), ((0, 1, 2, 3), 16)]))
    for name, limit in (("one", 10**9), ("many", 40_000)):
        (tmp_path / name).mkdir()
        write_child(tmp_path / name, source, plan, child_config(source.config, plan, None), limit)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(tmp_path / "one"), logits_of(tmp_path / "many"))
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "many")


@pytest.mark.parametrize("dialect", ["rope_parameters", "rope_scaling"])
def test_rope_factor_moves_the_context_with_it(tmp_path: Path, parent: Path, dialect: str) -> None:
    source = parent if dialect == "rope_parameters" else write_released_twin(tmp_path / "twin")
    assert dialect in json.loads((source / "config.json").read_text())
    assemble(tmp_path / "run", source, rope_factor=48)
    config = GptOssPuzzleConfig.from_pretrained(tmp_path / "run" / "child")
    assert config.max_position_embeddings == 4096 * 48
    assert config.rope_parameters["factor"] == 48.0
    before = GptOssPuzzleConfig.from_pretrained(source) if source != parent else GptOssConfig.from_pretrained(source)
    assert config.rope_parameters == before.rope_parameters | {"factor": 48.0}


@pytest.mark.parametrize(
    ("written", "model_stops", "vocabulary", "expected"),
    [
        ({"eos_token_id": [200002, 199999]}, 200002, 201088, [200002, 199999, 200012]),
        ({"eos_token_id": 200002}, 200002, 201088, [200002, 199999, 200012]),
        (None, 200002, 201088, [200002, 199999, 200012]),
        ({"eos_token_id": [5, 7]}, 2, 128, [5, 7, 2]),
        ({"eos_token_id": 2}, None, 128, [2]),
        ({}, None, 128, None),
    ],
)
def test_every_stop_token_is_listed_once(
    tmp_path: Path, written: dict[str, Any] | None, model_stops: int | None, vocabulary: int, expected: list[int] | None
) -> None:
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(written | {"do_sample": True}))
    settings = generation_config(tmp_path, {"eos_token_id": model_stops, "vocab_size": vocabulary})
    assert settings["eos_token_id"] == expected
    assert settings.get("do_sample") == (True if written is not None else None)


def test_plan_of_another_parent_is_refused(tmp_path: Path, parent: Path) -> None:
    plan = save_plan(tmp_path, write_released_twin(tmp_path / "twin"), [((0,), None)] * 4)
    with pytest.raises(ValueError, match=r"the plan is of the parent .*expert indices would mean other experts"):
        assemble(tmp_path / "run", parent, plan=plan)
    assert not (tmp_path / "run" / "child").exists()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([((0, 1), 8)] * 3, "the plan has 3 layers, the parent 4"),
        ([((0, 1), 8), ((0, 1), 8), ((0, 1), None), ((0, 1), 8)], "layer 2 the window None, wider than the parent's 8"),
        ([((0, 1), 9)] * 4, "layer 0 the window 9, wider"),
    ],
)
def test_plan_that_does_not_fit_is_refused(tmp_path: Path, parent: Path, blocks: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(tmp_path / "run", parent, plan=save_plan(tmp_path, parent, blocks))


def test_plan_with_experts_a_puzzle_parent_lacks_is_refused(tmp_path: Path) -> None:
    twin = write_released_twin(tmp_path / "twin")
    blocks = [((0, 4), b["sliding_window"]) for b in TWIN_BLOCKS]
    with pytest.raises(ValueError, match="keeps expert 4 of layer 3, which has 4"):
        assemble(tmp_path / "run", twin, plan=save_plan(tmp_path, twin, blocks))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 4}, "experts is given without importance"),
        ({"importance": Path("scores")}, "importance is given without experts"),
        ({"windows": {4: 8}}, r"windows names layers \[4\]; the parent has layers 0\.\.3"),
        ({"windows": {0: 16}}, "layer 0 the window 16, wider"),
        ({"windows": {1: 1}}, "sliding_window=1"),
        ({"rope_factor": 0.0}, "rope_factor must be above 0"),
        ({"plan": Path("plan.json"), "experts": 4}, "exclude each other"),
    ],
)
def test_contradictory_settings_are_refused(tmp_path: Path, parent: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(tmp_path / "run", parent, **change)
    assert not (tmp_path / "run" / "child").exists()


@pytest.mark.parametrize(
    ("spoil", "experts", "message"),
    [
        (lambda scores: scores[2].__setitem__(0, float("nan")), 4, "scores of layer 2 are not all finite"),
        (lambda scores: None, 9, "9 experts cannot be kept of 8"),
        (lambda scores: None, [4, 4], "2 expert counts were given for 4 layers"),
        (lambda scores: None, 0, "0 experts cannot be kept"),
    ],
)
def test_bad_importance_is_refused(
    tmp_path: Path, parent: Path, spoil: Callable[[list[list[float]]], None], experts: Any, message: str
) -> None:
    scores = [[float(index) for index in range(8)] for _ in range(4)]
    spoil(scores)
    importance = save_importance(tmp_path / "importance", parent, scores)
    with pytest.raises(ValueError, match=message):
        assemble(tmp_path / "run", parent, importance=importance, experts=experts)


def test_importance_of_another_parent_is_refused(tmp_path: Path, parent: Path) -> None:
    twin = write_released_twin(tmp_path / "twin")
    importance = save_importance(tmp_path / "importance", twin, [[float(index) for index in range(8)]] * 4)
    with pytest.raises(ValueError, match="importance scores are of parent"):
        assemble(tmp_path / "run", parent, importance=importance, experts=4)


def test_parent_is_never_replaced_by_its_child(tmp_path: Path, parent: Path) -> None:
    assemble(tmp_path / "run", parent)
    with pytest.raises(ValueError, match="replaced by its own child"):
        assemble(tmp_path / "run", tmp_path / "run" / "child")
    assert Checkpoint(tmp_path / "run" / "child").num_layers == 4


def write_plain_parent(folder: Path, layers: int, inner: int) -> Path:
    """A bf16 parent of 8 experts, and a plan that keeps every other one, so that its rows have to be copied."""
    stock = {"model_type": "gpt_oss", "num_hidden_layers": layers, "num_local_experts": 8, "sliding_window": 8}
    sizes = {"hidden_size": 256, "intermediate_size": inner, "head_dim": 8, "num_attention_heads": 2, "vocab_size": 64}
    config = stock | sizes | {"num_key_value_heads": 1, "num_experts_per_tok": 2}
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
    row, slack = 0 if by_kernel else 1 << 20, 1_500_000
    assert peaks["shallow"] <= row + slack and peaks["deep"] <= row + slack
    assert peaks["wide"] <= 4 * row + slack
    assert peaks["wide"] >= 2 * row  # the measurement sees the buffer
