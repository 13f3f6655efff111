"""Stock and masked exports of a child: loaded by unmodified transformers, with the child's logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.exports import MIXED, PARENT, UNIFORM, made_up_scales, make_child
from helpers.released_twin import write_released_twin
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.serve.export import export
from lit_puzzle.serve.settings import Storage
from lit_puzzle.serve.stock import MASK
from lit_puzzle.spec import BlockSpec, Plan

ASSETS = Path(__file__).parents[2] / "lit_puzzle" / "assets"
PROMPT = torch.randint(8, 128, (2, 40), generator=torch.Generator().manual_seed(0))


def logits_of(folder: Path, stock: bool) -> Tensor:
    """Logits in float32; of the unmodified class when `stock`."""
    kind = GptOssForCausalLM if stock else AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    assert stock == (type(model) is GptOssForCausalLM)
    with torch.no_grad():
        return model(PROMPT).logits


def test_a_uniform_child_is_stock_gpt_oss(tmp_path: Path) -> None:
    source = make_child(tmp_path, UNIFORM)
    results = export(tmp_path / "run", source, storage=Storage(format="stock"))
    folder = tmp_path / "run" / "model"
    assert torch.equal(logits_of(folder, stock=True), logits_of(source, stock=False))
    assert type(AutoConfig.from_pretrained(folder)) is GptOssConfig
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gpt_oss" and config["num_local_experts"] == 8 and config["sliding_window"] == 16
    assert config["architectures"] == ["GptOssForCausalLM"]
    assert not config.keys() & {"block_configs", "auto_map", "per_layer_config"}
    assert not (folder / "gpt_oss.py").exists() and results["parameters"] < 2_049_432
    loaded = AutoConfig.from_pretrained(folder)
    assert loaded.rope_parameters == AutoConfig.from_pretrained(PARENT).rope_parameters
    assert loaded.max_position_embeddings == 131072
    assert "trust_remote_code" not in (folder / "README.md").read_text()


def test_a_uniform_child_with_fewer_experts_than_top_k(tmp_path: Path) -> None:
    source = make_child(tmp_path, [((layer,), window) for layer, (_, window) in enumerate(UNIFORM)])
    edited = json.loads((source / "config.json").read_text()) | {"experts_per_token": 2}  # as the released gpt-oss
    (source / "config.json").write_text(json.dumps(edited))
    export(tmp_path / "run", source, storage=Storage(format="stock"))
    folder = tmp_path / "run" / "model"
    assert torch.equal(logits_of(folder, stock=True), logits_of(source, stock=False))
    config = json.loads((folder / "config.json").read_text())
    assert edited["num_experts_per_tok"] == 2
    assert config["num_experts_per_tok"] == config["experts_per_token"] == config["num_local_experts"] == 1


def test_masked_child_has_full_size_and_the_same_logits(tmp_path: Path) -> None:
    source = make_child(tmp_path, MIXED)
    export(tmp_path / "run", source, storage=Storage(format="masked"))
    masked, parent = Checkpoint(tmp_path / "run" / "model"), Checkpoint(PARENT)
    assert {name: info.shape for name, info in masked.tensors.items()} == {
        name: info.shape for name, info in parent.tensors.items()
    }
    torch.testing.assert_close(logits_of(masked.folder, stock=True), logits_of(source, stock=False), rtol=0, atol=1e-4)
    for layer, (kept, _) in enumerate(MIXED):
        bias, before = masked.layer(layer)["mlp.router.bias"], parent.layer(layer)["mlp.router.bias"]
        gone = [expert for expert in range(16) if expert not in kept]
        assert torch.equal(bias[list(kept)], before[list(kept)])  # each expert is where it was in the parent
        assert (bias[gone] == MASK).all() and bias.isfinite().all()
    assert (source / "plan.json").is_file() and not (masked.folder / "plan.json").exists()  # of other layers
    assert float(torch.tensor(MASK).bfloat16()) == float(torch.tensor(MASK).half()) == MASK


def test_masked_without_a_plan_fills_up_to_the_fullest_layer(tmp_path: Path) -> None:
    source = make_child(
        tmp_path, [((0, 3, 5), None if layer % 2 else 16) for layer in range(5)] + [((1, 2, 4, 7), None)]
    )
    (source / "plan.json").unlink()
    export(tmp_path / "run", source, storage=Storage(format="masked"))
    assert {count for count, _ in Checkpoint(tmp_path / "run" / "model").blocks} == {4}
    expected = logits_of(source, stock=False)
    torch.testing.assert_close(logits_of(tmp_path / "run" / "model", stock=True), expected, rtol=0, atol=1e-4)


def test_masked_mxfp4_experts(tmp_path: Path) -> None:
    export(tmp_path / "packed", make_child(tmp_path, MIXED), storage=Storage(experts="mxfp4"))
    export(tmp_path / "run", tmp_path / "packed" / "model", storage=Storage(format="masked"))
    folder = tmp_path / "run" / "model"
    assert Checkpoint(folder).mxfp4_layers == frozenset(range(6))
    model = GptOssForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "packed" / "model", attn_implementation="eager").float()
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, reference(PROMPT).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("stock", {0: ((0, 1, 2), 16)}, r"same number of experts in every layer; this child has \[3, 8\]"),
        ("stock", {1: (UNIFORM[1][0], 16)}, "layer 1 has a window of 16"),
        ("stock", {2: (UNIFORM[2][0], 8)}, r"one window for all windowed layers; this child has \[8, 16\]"),
        ("masked", {3: (UNIFORM[3][0], 32)}, r"one window for all windowed layers; this child has \[16, 32\]"),
    ],
)
def test_children_that_gpt_oss_cannot_represent_are_refused(
    tmp_path: Path, form: Any, change: dict[int, tuple[tuple[int, ...], int | None]], message: str
) -> None:
    source = make_child(tmp_path, [change.get(layer, block) for layer, block in enumerate(UNIFORM)])
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "run", source, storage=Storage(format=form))
    assert not (tmp_path / "run" / "model").exists()


def test_stock_exports_have_no_kv_scales(tmp_path: Path) -> None:
    made_up_scales(PARENT).save(tmp_path / "scales")
    with pytest.raises(ValueError, match="stock cannot have KV scales; give --kv_scales=null"):
        export(tmp_path / "run", PARENT, kv_scales=tmp_path / "scales", storage=Storage(format="stock"))


def test_plan_of_another_child_is_refused(tmp_path: Path) -> None:
    source = make_child(tmp_path, UNIFORM)
    plan = Plan.load(source / "plan.json")
    Plan(plan.parent_fingerprint, 16, (BlockSpec((0, 1), 16), *plan.blocks[1:])).save(source / "plan.json")
    for form in ("puzzle", "stock", "masked"):
        with pytest.raises(ValueError, match=r"plan\.json has \[2, 8, 8, 8, 8, 8\] experts in its layers"):
            export(tmp_path / "run", source, storage=Storage(format=form))
    assert not (tmp_path / "run").exists()


def test_windows_of_the_released_twin_need_the_puzzle_format(tmp_path: Path) -> None:
    twin = write_released_twin(tmp_path / "twin")
    with pytest.raises(ValueError, match=r"this child has \[4, 16\]"):
        export(tmp_path / "run", twin, tokenizer=PARENT, storage=Storage(format="masked"))
