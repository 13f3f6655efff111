"""Write an exported folder: configs, tokenizer, weights, model card with its plot, checksums.

Writes into an empty folder; the caller's `atomic_folder` makes it complete or absent. Memory and traffic: those of the
weights (`lit_puzzle.serve.export`), and a plot.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_puzzle.child.folder import CARRIED_FILES, PLAN_FILE
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import count_parameters, whole
from lit_puzzle.model.writer import MAX_SHARD_BYTES, write_checkpoint
from lit_puzzle.run.files import write_json
from lit_puzzle.serve.checksums import checksums
from lit_puzzle.serve.experts import Rounding
from lit_puzzle.serve.model_card import PICTURE, Facts, Sizes, card_text
from lit_puzzle.serve.plan_picture import draw_blocks
from lit_puzzle.serve.settings import Card, Format
from lit_puzzle.serve.tokenizer_files import copy_tokenizer
from lit_puzzle.serve.weights import Weights, layout_of, stream
from lit_puzzle.spec import Plan


@dataclass(frozen=True)
class Export:
    """A checked export that is ready to be written.

    Attributes:
        format: format of the folder.
        source: checkpoint that is exported.
        tokenizer: folder of the tokenizer.
        config: content of config.json.
        settings: content of generation_config.json.
        weights: every tensor.
        plan: plan of the child, if it has one.
        scales_from: where its KV scales come from, for the model card.
        rounding: counts of packing, updated while the weights are written.
    """

    format: Format
    source: Checkpoint
    tokenizer: Path
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    weights: Weights
    plan: Plan | None
    scales_from: str
    rounding: Rounding


def write_folder(folder: Path, export: Export, card: Card, max_shard_bytes: int = MAX_SHARD_BYTES) -> Facts:
    """Write everything into the empty `folder` and check the written weights.

    Args:
        folder: empty folder.
        export: what is written.
        card: settings of the model card.
        max_shard_bytes: largest size of a weight file.

    Returns:
        Facts about the written folder.

    Raises:
        ValueError: the written weights are not those that the written config implies.
    """
    write_json(folder / "config.json", export.config, indent=2)
    write_json(folder / "generation_config.json", export.settings, indent=2)
    copy_tokenizer(export.tokenizer, folder)
    copied = CARRIED_FILES if export.format == "masked" else (PLAN_FILE, *CARRIED_FILES)  # masked layers are full-size
    for name in copied:
        if (export.source.folder / name).is_file():
            shutil.copyfile(export.source.folder / name, folder / name)
    if export.format == "puzzle":
        modeling_file = export.source.family.child.modeling_file
        shutil.copyfile(modeling_file, folder / modeling_file.name)
    with checksums() as sums:
        layout, tensors = layout_of(export.weights), stream(export.weights)
        write_checkpoint(folder, layout, tensors, max_shard_bytes, shard_done=sums.add)
        facts = facts_of(Checkpoint(folder), export)
        draw_blocks(folder / PICTURE, facts.blocks, facts.parent_experts)
        (folder / "README.md").write_text(card_text(card, facts))
        sums.write(folder)
    return facts


def facts_of(written: Checkpoint, export: Export) -> Facts:
    """Return the facts about a written folder, for the model card and run.json."""
    scales = written.family.layer.kv_scales
    return Facts(
        format=export.format,
        family=written.family,
        blocks=written.blocks,
        parent_experts=None if export.plan is None else export.plan.num_parent_experts,
        packed=written.mxfp4_layers,
        kv_layers=frozenset(int(name.split(".")[2]) for name in written.tensors if name.endswith(scales)),
        scales_from=export.scales_from,
        stop_tokens=export.settings["eos_token_id"],
        rounding=export.rounding,
        sizes=Sizes(
            parameters=count_parameters(written.config),
            weight_bytes=sum(info.num_bytes for info in written.tensors.values()),
            context_tokens=whole(written.config, "max_position_embeddings"),
            fingerprint=written.fingerprint(),
            source_fingerprint=export.source.fingerprint(),
        ),
    )


def results_of(folder: Path, facts: Facts) -> dict[str, float]:
    """Return the results for run.json."""
    return {
        "parameters": facts.sizes.parameters,
        "weight_bytes": facts.sizes.weight_bytes,
        "files": sum(path.is_file() for path in folder.iterdir()),
        "mxfp4_layers": len(facts.packed),
        "kv_scale_layers": len(facts.kv_layers),
        "copied_experts": facts.rounding.copied_experts,
        "rounded_experts": facts.rounding.rounded_experts,
        "rounding_error": facts.rounding.relative_error(),
    }
