"""Export a child: one folder that is complete, which loads where lit_puzzle is not installed. A stage of its own.

Reads a checkpoint folder (assembled, distilled, recovered; gpt_oss or gpt_oss_puzzle) and, where they are named, KV
scales, a LoRA adapter, an MXFP4 parent, run.json files for the model card. Writes `run_dir/model`: config.json with
`block_configs`, weights with an index, generation config with every stop token, tokenizer and chat template, the
modelling file, README.md (the model card) with a picture, SHA256SUMS. The folder appears whole or not at all.

What is not asked to change is copied byte for byte, file to file. Nothing that a folder brings along is executed:
pickles and code of tokenizers are refused, modelling files of the checkpoint are not copied; ours is.

Memory: headers and 16 MiB; with `experts: mxfp4` or `plain`, one expert matrix of a layer in both forms; with another
dtype or an adapter, one tensor in both. Disk: the tensors. Traffic: each byte is read and written once, and read once
more, from the page cache, for its checksum.

Source: format of the released gpt-oss-puzzle-88B, with what its users found missing (stop tokens, YaRN parameters).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import KV_SCALES, count_parameters
from lit_puzzle.model.safetensors_file import DTYPE_CODES, DTYPES
from lit_puzzle.model.writer import MAX_SHARD_BYTES, atomic_folder, write_checkpoint
from lit_puzzle.runs import CONFIG, is_complete, require_input
from lit_puzzle.search.assemble import MODELLING_FILE
from lit_puzzle.serve import experts as packing
from lit_puzzle.serve import stock
from lit_puzzle.serve import weights as steps
from lit_puzzle.serve.adapter import Adapter, merged
from lit_puzzle.serve.checksums import checksums
from lit_puzzle.serve.configs import puzzle_config, stock_config, with_storage
from lit_puzzle.serve.hub import check_upload, upload
from lit_puzzle.serve.kv_scales import KVScales, check_positive
from lit_puzzle.serve.model_card import PICTURE, Card, Facts, card_text, read_run
from lit_puzzle.serve.plan_picture import draw_blocks
from lit_puzzle.serve.tokenizer_files import check_tokenizer, copy_tokenizer, generation_settings
from lit_puzzle.serve.weights import Weights
from lit_puzzle.spec import Plan

FOLDER = "model"
CARRIED_FILES = ("plan.json", "generation_lengths.json", "LICENSE", "USAGE_POLICY", "NOTICE")
Form = Literal["puzzle", "stock", "masked"]
Experts = Literal["stored", "plain", "mxfp4"]
Dtype = Literal["stored", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Exported:
    """What is about to be written, checked.

    Attributes:
        form: `puzzle`, `stock` or `masked`.
        source: The checkpoint.
        tokenizer: Folder of the tokenizer.
        config: config.json.
        settings: generation_config.json.
        weights: Every tensor.
        plan: Of the child, where it has one.
        rounding: Told while weights are written.
    """

    form: Form
    source: Checkpoint
    tokenizer: Path
    config: Mapping[str, Any]
    settings: Mapping[str, Any]
    weights: Weights
    plan: Plan | None
    rounding: packing.Rounding = field(default_factory=packing.Rounding)


def export(
    run_dir: Path,
    checkpoint: Path,
    kv_scales: Path | None = None,
    adapter: Path | None = None,
    experts: Experts = "stored",
    mxfp4_parent: Path | None = None,
    dtype: Dtype = "stored",
    format: Form = "puzzle",
    tokenizer: Path | None = None,
    card: Card | None = None,
    push_to_hub: str | None = None,
    private: bool = True,
) -> dict[str, float]:
    """Write a complete folder of a child to `run_dir/model`.

    Args:
        run_dir: Run folder of this stage.
        checkpoint: Folder of the child.
        kv_scales: Folder of recipes/calibrate_kv.yaml, run on this very checkpoint; without it, the scales that the
            checkpoint itself carries are kept.
        adapter: Folder of a PEFT LoRA adapter, to be merged.
        experts: `stored` leaves them as they are; `plain` unpacks MXFP4; `mxfp4` packs what is not packed.
        mxfp4_parent: With `experts: mxfp4`, the parent whose bytes experts get that still have its values.
        dtype: Of everything but packed experts and KV scales.
        format: `puzzle`; `stock`, plain gpt-oss, where the child allows; `masked`, full-size gpt-oss for checks.
        tokenizer: Folder of the tokenizer and chat template; default: the checkpoint.
        card: What the model card says beside the facts.
        push_to_hub: OWNER/NAME on the Hugging Face hub, where the complete folder goes.
        private: Whether that repository is made private.

    Returns:
        Parameters, weight bytes, files, layers with MXFP4 experts and with KV scales, experts copied and rounded.

    Raises:
        ValueError: Inputs that are missing, damaged or of another checkpoint; a format that cannot say the child; a
            folder that is already there.
    """
    card = card or Card()
    if push_to_hub is not None:
        check_upload(push_to_hub)
    for path in (*card.training, *card.evaluations.values()):
        read_run(path)
    if mxfp4_parent is not None and experts != "mxfp4":
        raise ValueError(f"mxfp4_parent is given with experts: {experts}; it only says what experts: mxfp4 takes")
    source = Checkpoint(require_input(checkpoint, "checkpoint"))
    words = source.folder if tokenizer is None else require_input(tokenizer, "tokenizer")
    check_tokenizer(words)
    plan_file = source.folder / "plan.json"
    plan = Plan.load(plan_file) if plan_file.is_file() else None
    rounding = packing.Rounding()
    weights = _trained(source, adapter, kv_scales, format)
    weights = _stored_as(weights, experts, dtype, _mxfp4_parent(mxfp4_parent, plan), rounding)
    config = puzzle_config(source)
    settings = generation_settings(source.folder, words, config)
    ready = _in_form(Exported(format, source, words, config, settings, weights, plan, rounding), dtype)
    target = run_dir / FOLDER
    mine = (run_dir / CONFIG).is_file() and not is_complete(run_dir)  # this recipe's own, interrupted
    with atomic_folder(target, replace=mine) as scratch:
        write_folder(scratch, ready, card)
    if push_to_hub is not None:
        upload(target, push_to_hub, private)
    return _results(target, ready)


def _trained(source: Checkpoint, adapter: Path | None, kv_scales: Path | None, form: Form) -> Weights:
    """The checkpoint's tensors with the adapter merged and the scales that belong to the result."""
    weights = steps.stored_weights(source)
    own = {name: source.read(name) for name in weights if name.endswith(KV_SCALES)}
    for name, scale in own.items():
        check_positive(scale.float(), name)
    if adapter is not None:
        if own or kv_scales is not None:
            raise ValueError(
                "KV scales hold for the weights they were measured on, and an adapter changes them: export with the "
                "adapter alone, run recipes/calibrate_kv.yaml on that folder, and export it with the scales"
            )
        weights = merged(weights, Adapter.open(require_input(adapter, "adapter")))
    if form != "puzzle":
        if kv_scales is not None:
            raise ValueError(f"format: {form} is read by engines that know no KV scales; leave kv_scales out")
        return steps.without_kv_scales(weights)
    if kv_scales is None:
        return weights
    scales = KVScales.load(require_input(kv_scales, "KV scales"))
    check_scales(scales, source)
    return steps.with_kv_scales(weights, scales.tensors())


def check_scales(scales: KVScales, source: Checkpoint) -> None:
    """Check that KV scales are of this checkpoint and of every layer that must have them.

    Raises:
        ValueError: They are of another one, or a layer of full attention has none.
    """
    scales.check_checkpoint(source.fingerprint())
    if len(scales.layers) != source.num_layers:
        raise ValueError(f"the KV scales are of {len(scales.layers)} layers, the checkpoint has {source.num_layers}")
    for layer, (found, (_, window)) in enumerate(zip(scales.layers, source.blocks, strict=True)):
        if found is None and window is None:
            raise ValueError(
                f"layer {layer} attends to everything and has no KV scale; only windowed layers may stay in bfloat16. "
                "Run recipes/calibrate_kv.yaml again"
            )


def _mxfp4_parent(folder: Path | None, plan: Plan | None) -> tuple[Checkpoint, Plan] | None:
    if folder is None:
        return None
    parent = Checkpoint(require_input(folder, "MXFP4 parent"))
    if plan is None:
        raise ValueError("mxfp4_parent needs the child's plan.json, which says which of its experts were kept")
    packing.check_packed_parent(parent, plan)
    return parent, plan


def _stored_as(
    weights: Weights,
    experts: Experts,
    dtype: Dtype,
    parent: tuple[Checkpoint, Plan] | None,
    rounding: packing.Rounding,
) -> Weights:
    """Packs before any conversion of the dtype, so that values are rounded once."""
    if experts == "mxfp4":
        weights = packing.packed(weights, parent, rounding)
    elif experts == "plain":
        weights = packing.unpacked(weights, DTYPES["BF16"] if dtype == "stored" else DTYPES[_code(dtype)])
    return weights if dtype == "stored" else steps.in_dtype(weights, DTYPES[_code(dtype)])


def _code(dtype: str) -> str:
    return next(code for code, known in DTYPES.items() if str(known) == f"torch.{dtype}")


def _in_form(ready: Exported, dtype: Dtype) -> Exported:
    """The same export with the config, and the weights, of the format that was asked for."""
    blocks, weights, config = ready.source.blocks, ready.weights, dict(ready.config)
    if ready.form == "stock":
        stock.check_stock(blocks)
        config = stock_config(config, blocks[0][0], blocks)
    elif ready.form == "masked":
        stock.check_masked(blocks)
        rows, experts = stock.positions(blocks, ready.plan)
        weights, config = stock.masked(weights, rows, experts), stock_config(config, experts, blocks)
    stated = config.get("dtype") or config.get("torch_dtype")
    name = dtype if dtype != "stored" else stated or str(DTYPES[weights["model.embed_tokens.weight"].dtype])
    packed = steps.mxfp4_layers(weights, len(blocks))
    config = with_storage(config, packed, len(blocks), name.removeprefix("torch."))
    return Exported(
        ready.form, ready.source, ready.tokenizer, config, ready.settings, weights, ready.plan, ready.rounding
    )


def write_folder(folder: Path, ready: Exported, card: Card, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write everything into the empty `folder` and check what was written.

    Raises:
        ValueError: The weights written are not those that the written config implies.
    """
    (folder / "config.json").write_text(json.dumps(ready.config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(ready.settings, indent=2) + "\n")
    copy_tokenizer(ready.tokenizer, folder)
    for name in CARRIED_FILES:
        if (ready.source.folder / name).is_file():
            shutil.copyfile(ready.source.folder / name, folder / name)
    if ready.form == "puzzle":
        shutil.copyfile(MODELLING_FILE, folder / MODELLING_FILE.name)
    with checksums() as sums:
        layout, tensors = steps.layout_of(ready.weights), steps.handed_over(ready.weights)
        write_checkpoint(folder, layout, tensors, max_shard_bytes, shard_done=sums.add)
        written = Checkpoint(folder)
        parent_experts = None if ready.plan is None else ready.plan.num_parent_experts
        draw_blocks(folder / PICTURE, written.blocks, parent_experts)
        (folder / "README.md").write_text(card_text(card, facts_of(written, ready)))
        sums.write(folder)


def facts_of(written: Checkpoint, ready: Exported) -> Facts:
    """What the card says of the folder."""
    return Facts(
        ready.form,
        written.blocks,
        None if ready.plan is None else ready.plan.num_parent_experts,
        written.mxfp4_layers,
        _kv_layers(written),
        ready.settings["eos_token_id"],
        ready.rounding.rounded_experts,
        ready.rounding.relative_error(),
        count_parameters(written.config),
        sum(info.num_bytes for info in written.tensors.values()),
        int(written.config["max_position_embeddings"]),
    )


def _kv_layers(written: Checkpoint) -> frozenset[int]:
    return frozenset(int(name.split(".")[2]) for name in written.tensors if name.endswith(KV_SCALES))


def _results(folder: Path, ready: Exported) -> dict[str, float]:
    written = Checkpoint(folder)
    return {
        "parameters": count_parameters(written.config),
        "weight_bytes": sum(info.num_bytes for info in written.tensors.values()),
        "files": sum(path.is_file() for path in folder.rglob("*")),
        "mxfp4_layers": len(written.mxfp4_layers),
        "kv_scale_layers": len(_kv_layers(written)),
        "copied_experts": ready.rounding.copied_experts,
        "rounded_experts": ready.rounding.rounded_experts,
        "rounding_error": ready.rounding.relative_error(),
    }
