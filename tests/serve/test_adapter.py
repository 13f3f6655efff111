"""Merged adapters equal PEFT's own merge weight by weight; other kinds of adapters are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.serve.export import export
from lit_puzzle.serve.settings import Storage

CHILD = Path(__file__).parents[2] / "lit_puzzle" / "assets" / "tiny_child"
PROMPT = torch.randint(8, 128, (2, 40), generator=torch.Generator().manual_seed(0))


def train_adapter(folder: Path, **options: Any) -> PeftModel:
    """Save an adapter on the attention with random matrices; return PEFT's model."""
    base = AutoModelForCausalLM.from_pretrained(CHILD, dtype=torch.float32, attn_implementation="eager")
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**settings | options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {r"layers\.[0-3]\.self_attn\.o_proj": 5}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_merged_as_peft_merges(tmp_path: Path, options: dict[str, Any]) -> None:
    model = train_adapter(tmp_path / "adapter", **options)
    export(tmp_path / "run", CHILD, adapter=tmp_path / "adapter", storage=Storage(dtype="stored"))
    written, before = Checkpoint(tmp_path / "run" / "model"), Checkpoint(CHILD)
    merged = model.merge_and_unload().state_dict()
    changed = [name for name in before.tensors if not torch.equal(written.read(name), before.read(name))]
    assert len(changed) == 18 and all(
        name.endswith(("q_proj.weight", "v_proj.weight", "o_proj.weight")) for name in changed
    )
    for name in before.tensors:
        assert torch.equal(written.read(name), merged[name].to(written.read(name).dtype)), name


def test_logits_are_those_of_the_adapted_model(tmp_path: Path) -> None:
    model = train_adapter(tmp_path / "adapter").eval()
    export(tmp_path / "exact", CHILD, storage=Storage(dtype="float32"))
    export(tmp_path / "merged", tmp_path / "exact" / "model", adapter=tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(PROMPT).logits, model(PROMPT).logits, rtol=0, atol=1e-4)


def test_another_dtype_is_rounded_once(tmp_path: Path) -> None:
    """In float32 W + (alpha / rank) B A has no rounding at all; in float16 the one of float16."""
    model = train_adapter(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    name = "model.layers.2.self_attn.q_proj.weight"
    for dtype in ("float32", "float16"):
        export(tmp_path / dtype, CHILD, adapter=tmp_path / "adapter", storage=Storage(dtype=dtype))
        written = Checkpoint(tmp_path / dtype / "model").read(name)
        assert torch.equal(written, merged[name].to(written.dtype)) and str(written.dtype) == f"torch.{dtype}"
        assert not torch.equal(written, merged[name].bfloat16().to(written.dtype))


def spoil_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True; only plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is {'nblocks': 2}"),
        ({"r": 3}, r"has matrices \(4, 128\) and \(96, 4\); the rank is 3"),
        ({"r": "4"}, "r has '4'; a rank is a positive whole number"),
        ({"r": -4}, r"adapter_config\.json: r has -4; a rank"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save is \['embed_tokens'\]"),
        (
            {"target_modules": ["q_proj", "up_proj"]},
            "target_modules has 'up_proj', .* no tensors; there are of [a-z_, ]*q_proj",
        ),
        ({"lora_alpha": float("nan")}, r"adapter_config\.json: NaN is not a JSON number"),
        ({"lora_alpha": -1}, "lora_alpha has -1"),
        ({"lora_alpha": None}, "lora_alpha has None"),
        ({"rank_pattern": {"q_proj": -2}}, "rank_pattern has -2"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern has 2.5; a rank is a positive whole number"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "Infinity is not a JSON number"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must be an object, got list"),
        (
            {"rank_pattern": {"(q_proj": 2}},
            r"adapter_config\.json: rank_pattern \['\(q_proj'\] cannot be matched: missing \), unterminated",
        ),
    ],
)
def test_another_kind_of_adapter_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    train_adapter(tmp_path / "adapter")
    spoil_config(tmp_path / "adapter", **changes)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "run", CHILD, adapter=tmp_path / "adapter")
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_refused(tmp_path: Path, start: str) -> None:
    """PEFT subtracts the initial B A from the base for these; W + B A of the unchanged base would be wrong."""
    model = train_adapter(tmp_path / "adapter", init_lora_weights=start)
    name = "model.layers.0.self_attn.q_proj"
    base, theirs = Checkpoint(CHILD).read(f"{name}.weight").float(), model.base_model.model.get_submodule(name)
    assert not torch.allclose(theirs.base_layer.weight, base, atol=1e-3)
    with pytest.raises(ValueError, match=f"init_lora_weights is '{start}'; only plain LoRA on an unchanged base"):
        export(tmp_path / "run", CHILD, adapter=tmp_path / "adapter")


def test_tensors_of_other_adapters_are_refused(tmp_path: Path) -> None:
    train_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "run", CHILD, adapter=tmp_path / "adapter")

    extra = {"base_model.model.lm_head.weight": torch.zeros(128, 96)}
    refused(tensors | extra, r"lm_head\.weight is not a LoRA matrix of a linear layer")
    refused(
        {name: t for name, t in tensors.items() if name != f"{stem}B.weight"}, "without the other matrix of its product"
    )
    other = {name.replace("layers.5", "layers.9"): tensor for name, tensor in tensors.items()}
    refused(other, r"changes model\.layers\.9\.self_attn\.o_proj\.weight, which the checkpoint does not have")
    refused(tensors | {f"{stem}A.weight": torch.zeros(4, 95)}, r"by \(128, 95\); the checkpoint has \(128, 96\)")
    file.rename(file.with_name("adapter_model.bin"))
    with pytest.raises(ValueError, match="an adapter saved as a pickle is refused"):
        export(tmp_path / "run", CHILD, adapter=tmp_path / "adapter")


def test_adapter_and_kv_scales_exclude_each_other(tmp_path: Path) -> None:
    train_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match="an adapter changes them: export with the adapter alone"):
        export(tmp_path / "run", CHILD, adapter=tmp_path / "adapter", kv_scales=tmp_path / "scales")


def test_a_pattern_that_would_take_forever_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_puzzle.serve.adapter.MATCHING_SECONDS", 1.0)
    train_adapter(tmp_path / "adapter")
    spoil_config(tmp_path / "adapter", rank_pattern={r"((\w|_|\.)+)+!": 2})
    with pytest.raises(ValueError, match=r"matching rank_pattern .* took more than 1 seconds\. Give the names"):
        export(tmp_path / "run", CHILD, adapter=tmp_path / "adapter")


def test_damaged_adapters_are_refused(tmp_path: Path) -> None:
    train_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "run", CHILD, adapter=tmp_path / "adapter")
        assert not (tmp_path / "run" / "model").exists()

    key = "base_model.model.model.layers.4.self_attn.o_proj.lora_B.weight"
    save_file(tensors | {key: torch.full_like(tensors[key], float("nan"))}, file)
    refused(r"layers\.4\.self_attn\.o_proj\.lora_B\.weight has .*values that are not finite")
    save_file(tensors | {key: tensors[key].reshape(-1)}, file)
    refused("has matrices")
    save_file({}, file)
    refused("contains no adapter")
    file.write_bytes(file.read_bytes()[:40])
    refused("truncated|damaged|not a safetensors file")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    refused(r"holds no adapter_config\.json")
