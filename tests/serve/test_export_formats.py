"""Plain gpt-oss out of a child: loaded by unmodified transformers, with the child's logits."""

import json
from pathlib import Path

import pytest
import torch
from helpers.released_twin import write_released_twin
from test_export import scales_of
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from lit_puzzle.child.assemble import assemble
from lit_puzzle.model.checkpoint import Checkpoint, fingerprint
from lit_puzzle.serve.export import export
from lit_puzzle.serve.stock import MASK
from lit_puzzle.spec import BlockSpec, Plan

ASSETS = Path(__file__).parents[2] / "lit_puzzle" / "assets"
PARENT = ASSETS / "tiny_parent"
PROMPT = torch.randint(8, 128, (2, 40), generator=torch.Generator().manual_seed(0))
Blocks = list[tuple[tuple[int, ...], int | None]]


def logits_of(folder: Path, stock: bool) -> Tensor:
    """Logits in float32; of the unmodified class when `stock`."""
    kind = GptOssForCausalLM if stock else AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    assert stock == (type(model) is GptOssForCausalLM)
    with torch.no_grad():
        return model(PROMPT).logits


def child(folder: Path, blocks: Blocks, parent: Path = PARENT) -> Path:
    """A child of the tiny parent by its experts and windows."""
    experts = max(count for count, _ in Checkpoint(parent).blocks)
    Plan(fingerprint(parent), experts, tuple(BlockSpec(*block) for block in blocks)).save(folder / "plan.json")
    assemble(folder / "assembled", parent, plan=folder / "plan.json")
    return folder / "assembled" / "child"


UNIFORM: Blocks = [((0, 3, 5, 6, 9, 11, 12, 15), None if layer % 2 else 16) for layer in range(6)]
MIXED: Blocks = [
    ((1, 2, 7), 16),
    ((0, 3, 5, 6, 9), None),
    ((4,), 16),
    (tuple(range(16)), 16),
    ((2, 15), 16),
    ((3, 8, 10, 14), None),
]


def test_uniform_child_is_plain_gpt_oss(tmp_path: Path) -> None:
    source = child(tmp_path, UNIFORM)
    results = export(tmp_path / "run", source, format="stock")
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


def test_uniform_child_with_fewer_experts_than_a_token_takes(tmp_path: Path) -> None:
    source = child(tmp_path, [((layer,), window) for layer, (_, window) in enumerate(UNIFORM)])
    edited = json.loads((source / "config.json").read_text()) | {"experts_per_token": 2}  # as the released gpt-oss
    (source / "config.json").write_text(json.dumps(edited))
    export(tmp_path / "run", source, format="stock")
    folder = tmp_path / "run" / "model"
    assert torch.equal(logits_of(folder, stock=True), logits_of(source, stock=False))
    config = json.loads((folder / "config.json").read_text())
    assert edited["num_experts_per_tok"] == 2
    assert config["num_experts_per_tok"] == config["experts_per_token"] == config["num_local_experts"] == 1


def test_masked_child_has_full_size_and_the_same_logits(tmp_path: Path) -> None:
    source = child(tmp_path, MIXED)
    export(tmp_path / "run", source, format="masked")
    masked, parent = Checkpoint(tmp_path / "run" / "model"), Checkpoint(PARENT)
    assert {name: info.shape for name, info in masked.tensors.items()} == {
        name: info.shape for name, info in parent.tensors.items()
    }
    torch.testing.assert_close(logits_of(masked.folder, stock=True), logits_of(source, stock=False), rtol=0, atol=1e-4)
    for layer, (kept, _) in enumerate(MIXED):
        bias, before = masked.layer(layer)["mlp.router.bias"], parent.layer(layer)["mlp.router.bias"]
        gone = [expert for expert in range(16) if expert not in kept]
        assert torch.equal(bias[list(kept)], before[list(kept)])  # each expert where it stood in the parent
        assert (bias[gone] == MASK).all() and bias.isfinite().all()
    assert (source / "plan.json").is_file() and not (masked.folder / "plan.json").exists()  # of other layers
    assert float(torch.tensor(MASK).bfloat16()) == float(torch.tensor(MASK).half()) == MASK


def test_masked_without_a_plan_fills_up_to_the_fullest_layer(tmp_path: Path) -> None:
    source = child(tmp_path, [((0, 3, 5), None if layer % 2 else 16) for layer in range(5)] + [((1, 2, 4, 7), None)])
    (source / "plan.json").unlink()
    export(tmp_path / "run", source, format="masked")
    assert {count for count, _ in Checkpoint(tmp_path / "run" / "model").blocks} == {4}
    expected = logits_of(source, stock=False)
    torch.testing.assert_close(logits_of(tmp_path / "run" / "model", stock=True), expected, rtol=0, atol=1e-4)


def test_masked_mxfp4_experts(tmp_path: Path) -> None:
    export(tmp_path / "packed", child(tmp_path, MIXED), experts="mxfp4")
    export(tmp_path / "run", tmp_path / "packed" / "model", format="masked")
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
def test_what_plain_gpt_oss_cannot_say_is_refused(
    tmp_path: Path, form: str, change: dict[int, tuple[tuple[int, ...], int | None]], message: str
) -> None:
    source = child(tmp_path, [change.get(layer, block) for layer, block in enumerate(UNIFORM)])
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "run", source, format=form)  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "model").exists()


def test_plain_gpt_oss_takes_no_kv_scales(tmp_path: Path) -> None:
    scales_of(PARENT).save(tmp_path / "scales")
    with pytest.raises(ValueError, match="engines that know no KV scales; give --kv_scales=null"):
        export(tmp_path / "run", PARENT, format="stock", kv_scales=tmp_path / "scales")


def test_plan_of_another_child_is_refused(tmp_path: Path) -> None:
    source = child(tmp_path, UNIFORM)
    plan = Plan.load(source / "plan.json")
    Plan(plan.parent_fingerprint, 16, (BlockSpec((0, 1), 16), *plan.blocks[1:])).save(source / "plan.json")
    for form in ("puzzle", "stock", "masked"):
        with pytest.raises(ValueError, match=r"plan\.json has \[2, 8, 8, 8, 8, 8\] experts in its layers"):
            export(tmp_path / "run", source, format=form)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_windows_of_the_released_twin_need_the_puzzle_format(tmp_path: Path) -> None:
    twin = write_released_twin(tmp_path / "twin")
    with pytest.raises(ValueError, match=r"this child has \[4, 16\]"):
        export(tmp_path / "run", twin, format="masked", tokenizer=PARENT)
