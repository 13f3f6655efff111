"""LoRA adapters to merge, and other inputs of the export."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from faults.case import NOTHING, Case, Right, refused
from faults.damage import Damage, all_of, cut, directory, remove, tensors, write

CONFIG, WEIGHTS = "lora/adapter_config.json", "lora/adapter_model.safetensors"
RANK = 4
ADAPTED = ("--adapter=lora",)
STEM = "base_model.model.model.layers.1.self_attn.q_proj"


def adapter(**config: Any) -> Damage:
    """Return what writes an adapter on one matrix of the child."""
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"} | config
    matrices = {f"{STEM}.lora_A.weight": torch.ones(RANK, 96), f"{STEM}.lora_B.weight": torch.ones(128, RANK) / 64}

    def apply(folder: Path) -> None:
        (folder / "lora").mkdir()
        (folder / CONFIG).write_text(json.dumps(content))
        save_file(matrices, folder / WEIGHTS)

    return apply


def case(name: str, damage: Damage, *words: str) -> Case:
    """Return a case of a refused adapter."""
    return Case(f"adapter: {name}", "training", "export", damage, refused(*words), ADAPTED)


def poisoned(value: float) -> Damage:
    """Return an adapter with one wrong number."""
    return all_of(
        adapter(), tensors(WEIGHTS, lambda content: content[f"{STEM}.lora_A.weight"].view(-1)[3:4].fill_(value))
    )


def renamed(old: str, new: str) -> Damage:
    """Return an adapter of another matrix."""

    def change(content: dict[str, torch.Tensor]) -> None:
        for name in list(content):
            content[name.replace(old, new)] = content.pop(name)

    return all_of(adapter(), tensors(WEIGHTS, change))


CATASTROPHE = {"(((a|o)+)+)+(((_|e)*)*)*x": 8, "((.*)*)*((.*)*)*((.*)*)*y": 8}
CASES = [
    *(
        case(
            f"alpha is {value}",
            all_of(
                adapter(),
                write(
                    CONFIG,
                    json.dumps({"peft_type": "LORA", "r": RANK, "target_modules": ["q_proj"]})[:-1]
                    + f', "lora_alpha": {value}}}',
                ),
            ),
            "adapter_config.json|lora",
            "lora_alpha|alpha|JSON|number",
        )
        for value in ("NaN", "Infinity", "-8", '"eight"', "null", "1e400", "[]")
    ),
    *(case(f"rank is {value!r}", adapter(r=value), "lora", "r") for value in (0, -4, 5, "four", None, 4.5)),
    case("catastrophic rank_pattern", adapter(rank_pattern=CATASTROPHE), "adapter_config.json|lora", "rank_pattern"),
    case("rank_pattern is no expression", adapter(rank_pattern={"(((": 4}), "adapter_config.json|lora", "rank_pattern"),
    case(
        "alpha_pattern with NaN",
        adapter(alpha_pattern={"q_proj": float("nan")}),
        "adapter_config.json|lora",
        "alpha_pattern|JSON",
    ),
    case("alpha_pattern is a list", adapter(alpha_pattern=[1]), "adapter_config.json|lora", "alpha_pattern|JSON"),
    case("NaN in a matrix", poisoned(float("nan")), "lora", "q_proj"),
    case("infinity in a matrix", poisoned(float("inf")), "lora", "q_proj"),
    case("of another base: a layer more", renamed("layers.1.", "layers.9."), "layers.9."),
    case("of another base: another module", renamed("q_proj", "qkv_proj"), "qkv_proj"),
    case("of another base: another shape", renamed("q_proj", "o_proj"), "o_proj"),
    case(
        "half of a product",
        all_of(adapter(), tensors(WEIGHTS, lambda content: content.pop(f"{STEM}.lora_B.weight"))),
        "lora_A",
    ),
    case(
        "changes nothing",
        all_of(adapter(), tensors(WEIGHTS, lambda content: content.clear())),
        "adapter_model.safetensors|lora",
    ),
    case("DoRA", adapter(use_dora=True), "use_dora"),
    case("IA3", adapter(peft_type="IA3"), "peft_type"),
    case("bias trained", adapter(bias="all"), "bias"),
    case("modules_to_save", adapter(modules_to_save=["lm_head"]), "modules_to_save"),
    case("PiSSA", adapter(init_lora_weights="pissa"), "init_lora_weights"),
    case(
        "only a pickle",
        all_of(adapter(), remove(WEIGHTS), write("lora/adapter_model.bin", b"\x80\x04.")),
        "adapter_model",
    ),
    case("cut weights", all_of(adapter(), cut(WEIGHTS, 0.5)), "adapter_model.safetensors"),
    case("cut config", all_of(adapter(), cut(CONFIG, 0.5)), "adapter_config.json"),
    case("config is a list", all_of(adapter(), write(CONFIG, "[]")), "adapter_config.json"),
    case("no config", all_of(adapter(), remove(CONFIG)), "adapter_config.json"),
    case(
        "a key twice",
        all_of(adapter(), write(CONFIG, '{"peft_type": "LORA", "r": 4, "r": 4, "lora_alpha": 8}')),
        "adapter_config.json",
    ),
    case("missing", NOTHING, "lora"),
    case("an empty folder", directory("lora"), "adapter_config.json"),
    Case(
        "adapter: settings that do not change what its matrices say",
        "training",
        "export",
        adapter(base_model_name_or_path="other", layers_to_transform="x"),
        (Right(damage=adapter(), words=ADAPTED), refused("lora")),
        ADAPTED,
    ),
    Case(
        "export: missing run of the card",
        "reader",
        "export",
        NOTHING,
        refused("runs/gone"),
        ("--card.training=[runs/gone]",),
    ),
    Case(
        "export: a broken run of the card",
        "reader",
        "export",
        write("runs/broken/run.json", "{"),
        refused("run.json"),
        ("--card.training=[runs/broken]",),
    ),
    Case(
        "export: a format that cannot hold the child",
        "reader",
        "export",
        NOTHING,
        refused("stock"),
        ("--storage.format=stock",),
    ),
    Case(
        "export: a repository name that is none",
        "reader",
        "export",
        NOTHING,
        refused("repository"),
        ("--upload.repository=a/b/c",),
    ),
    Case(
        "export: missing MXFP4 parent",
        "reader",
        "export",
        NOTHING,
        refused("gone"),
        ("--storage.experts=mxfp4", "--storage.mxfp4_parent=gone"),
    ),
]
