"""What the folder of an export is made of, and how it is written: every file, then the card, then the checksums.

Writes into an empty folder; that it appears whole or never is the caller's `atomic_folder`. Memory and traffic: those
of its weights (`lit_puzzle.serve.export`), and a picture.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_puzzle.child.folder import CARRIED_FILES, PLAN_FILE
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import family_of
from lit_puzzle.model.layout import KV_SCALES, count_parameters, whole
from lit_puzzle.model.writer import MAX_SHARD_BYTES, write_checkpoint
from lit_puzzle.serve.checksums import checksums
from lit_puzzle.serve.experts import Rounding
from lit_puzzle.serve.model_card import PICTURE, Card, Facts, card_text
from lit_puzzle.serve.plan_picture import draw_blocks
from lit_puzzle.serve.tokenizer_files import copy_tokenizer
from lit_puzzle.serve.weights import Weights, handed_over, layout_of
from lit_puzzle.spec import Plan

Form = Literal["puzzle", "stock", "masked"]


@dataclass(frozen=True)
class Exported:
    """What is about to be written, checked.

    Attributes:
        form: `puzzle`, `stock` or `masked`.
        source: Folder of the checkpoint.
        tokenizer: Folder of the tokenizer.
        config: config.json.
        settings: generation_config.json.
        weights: Every tensor.
        plan: Of the child, where it has one.
        scales_from: Where its KV scales come from, for the card.
        rounding: Told while weights are written.
    """

    form: Form
    source: Path
    tokenizer: Path
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    weights: Weights
    plan: Plan | None
    scales_from: str
    rounding: Rounding


def write_folder(folder: Path, exported: Exported, card: Card, max_shard_bytes: int = MAX_SHARD_BYTES) -> Facts:
    """Write everything into the empty `folder` and check what was written.

    Returns:
        What the card and the run's record say of it.

    Raises:
        ValueError: The weights written are not those that the written config implies.
    """
    (folder / "config.json").write_text(json.dumps(exported.config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(exported.settings, indent=2) + "\n")
    copy_tokenizer(exported.tokenizer, folder)
    carried = CARRIED_FILES if exported.form == "masked" else (PLAN_FILE, *CARRIED_FILES)  # a mask is not of the plan
    for name in carried:
        if (exported.source / name).is_file():
            shutil.copyfile(exported.source / name, folder / name)
    if exported.form == "puzzle":
        modeling_file = family_of(exported.config).child.modeling_file
        shutil.copyfile(modeling_file, folder / modeling_file.name)
    with checksums() as sums:
        layout, tensors = layout_of(exported.weights), handed_over(exported.weights)
        write_checkpoint(folder, layout, tensors, max_shard_bytes, shard_done=sums.add)
        facts = facts_of(Checkpoint(folder), exported)
        draw_blocks(folder / PICTURE, facts.blocks, facts.parent_experts)
        (folder / "README.md").write_text(card_text(card, facts))
        sums.write(folder)
    return facts


def facts_of(written: Checkpoint, exported: Exported) -> Facts:
    """What the card and the run's record say of a folder that was written."""
    return Facts(
        form=exported.form,
        blocks=written.blocks,
        parent_experts=None if exported.plan is None else exported.plan.num_parent_experts,
        packed=written.mxfp4_layers,
        kv_layers=frozenset(int(name.split(".")[2]) for name in written.tensors if name.endswith(KV_SCALES)),
        scales_from=exported.scales_from,
        stop_tokens=exported.settings["eos_token_id"],
        copied_experts=exported.rounding.copied_experts,
        rounded_experts=exported.rounding.rounded_experts,
        rounding_error=exported.rounding.relative_error(),
        parameters=count_parameters(written.config),
        weight_bytes=sum(info.num_bytes for info in written.tensors.values()),
        context_tokens=whole(written.config, "max_position_embeddings"),
    )


def results_of(folder: Path, facts: Facts) -> dict[str, float]:
    """The numbers for run.json."""
    return {
        "parameters": facts.parameters,
        "weight_bytes": facts.weight_bytes,
        "files": sum(path.is_file() for path in folder.iterdir()),
        "mxfp4_layers": len(facts.packed),
        "kv_scale_layers": len(facts.kv_layers),
        "copied_experts": facts.copied_experts,
        "rounded_experts": facts.rounded_experts,
        "rounding_error": facts.rounding_error,
    }
