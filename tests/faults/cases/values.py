"""Weights, scales and checksums whose values are wrong."""

import torch

from faults.case import Case, Right, refused
from faults.cases.checkpoints import MODEL, READERS, with_tensor
from faults.damage import Damage, all_of, copy, edit, flip, remove, tensors

NAME = "model.layers.2.self_attn.o_proj.weight"


def poisoned(folder: str, value: float, name: str = NAME) -> Damage:
    """Return the damage of one element of one weight."""

    def change(content: dict[str, torch.Tensor]) -> None:
        content[name].view(-1)[17] = value

    return tensors(f"{folder}/{MODEL}", change)


def scale(value: float | None, layer: int = 1, field: str = "k_scale") -> Damage:
    """Return the damage of one FP8 scale of runs/calibrate_kv, in both of its files."""

    def change(content: dict[str, torch.Tensor]) -> None:
        for name in [name for name in content if f"layers.{layer}." in name and field in name]:
            if value is None:
                del content[name]
            else:
                content[name] = torch.full_like(content[name], value)

    both = [tensors("runs/calibrate_kv/kv_scales.safetensors", change)]
    return all_of(*both, edit("runs/calibrate_kv/kv_scales.json", {f"layers.{layer}.{field}": value}))


def kv_case(name: str, damage: Damage, *words: str, stage: str = "evaluate") -> Case:
    """Return a case of refused FP8 scales."""
    more = ("--kv_cache=fp8",) if stage == "evaluate" else ()
    return Case(
        f"KV scales: {name}: {stage}",
        "training",
        stage,
        damage,
        refused(*words),
        (*more, "--kv_scales=runs/calibrate_kv"),
        ("runs/calibrate_kv",),
    )


CASES = [
    *(
        Case(
            f"{label} in one weight: {stage}",
            "reader",
            stage,
            poisoned(READERS[stage], value),
            refused(NAME),
        )
        for label, value, stages in (
            ("NaN", float("nan"), ("evaluate", "export", "generate", "rl_recover", "importance", "calibrate_kv")),
            ("infinity", float("inf"), ("evaluate", "export", "generate")),
        )
        for stage in stages
    ),
    Case("NaN in one weight: distill's child", "reader", "distill", poisoned("child", float("nan")), refused(NAME)),
    Case(
        "NaN in one expert: evaluate",
        "reader",
        "evaluate",
        poisoned("child", float("nan"), "model.layers.3.mlp.experts.down_proj"),
        refused("model.layers.3.mlp.experts.down_proj"),
    ),
    Case(
        "NaN in a router of a parent: assemble",
        "reader",
        "assemble",
        poisoned("parent", float("nan"), "model.layers.2.mlp.router.weight"),
        refused("model.layers.2.mlp.router.weight|parent"),
    ),
    Case(
        "negative KV scale in the checkpoint: export",
        "training",
        "export",
        with_tensor("model.layers.1.self_attn.k_scale", torch.tensor(-1.0)),
        refused("model.layers.1.self_attn.k_scale"),
    ),
    Case(
        "NaN KV scale in the checkpoint: export",
        "training",
        "export",
        with_tensor("model.layers.1.self_attn.v_scale", torch.tensor(float("nan"))),
        refused("model.layers.1.self_attn.v_scale"),
    ),
    *(
        kv_case(label, scale(value), "k_scale|layer 1|kv_scales", stage=stage)
        for label, value in (("zero", 0.0), ("negative", -0.5), ("NaN", float("nan")), ("infinity", float("inf")))
        for stage in ("evaluate", "export")
    ),
    kv_case("missing in a layer of full attention", scale(None), "kv_scales", stage="export"),
    kv_case(
        "of another checkpoint",
        edit("runs/calibrate_kv/kv_scales.json", {"fingerprint": "0" * 64}),
        "runs/calibrate_kv|fingerprint",
        stage="export",
    ),
    kv_case(
        "of another checkpoint",
        edit("runs/calibrate_kv/kv_scales.json", {"fingerprint": "0" * 64}),
        "runs/calibrate_kv|fingerprint",
    ),
    kv_case(
        "no file of scales", remove("runs/calibrate_kv/kv_scales.safetensors"), "kv_scales.safetensors", stage="export"
    ),
    kv_case(
        "a text as fingerprint's layers",
        edit("runs/calibrate_kv/kv_scales.json", {"layers": "six"}),
        "kv_scales.json|layers|runs/calibrate_kv",
        stage="export",
    ),
    Case(
        "export with a wrong checksum: evaluate",
        "folders",
        "evaluate",
        flip("runs/export/model/model.safetensors"),
        refused("model.safetensors", "SHA256SUMS|sha256|checksum"),
        ("--checkpoint=runs/export/model",),
        ("runs/export",),
    ),
    Case(
        "export with a wrong checksum: export",
        "folders",
        "export",
        flip("runs/export/model/model.safetensors"),
        refused("model.safetensors", "SHA256SUMS|sha256|checksum"),
        ("--checkpoint=runs/export/model",),
        ("runs/export",),
    ),
    Case(
        "export with a wrong checksum of a small file: evaluate",
        "folders",
        "evaluate",
        edit("runs/export/model/generation_config.json", {"eos_token_id": [5]}),
        refused("generation_config.json", "SHA256SUMS|sha256|checksum"),
        ("--checkpoint=runs/export/model",),
        ("runs/export",),
    ),
    Case(
        "a good export: evaluate",
        "folders",
        "evaluate",
        copy("runs/export/model", "again"),
        Right(words=("--checkpoint=child",)),
        ("--checkpoint=again",),
        ("runs/export",),
    ),
]
