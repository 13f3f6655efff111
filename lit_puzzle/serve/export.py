"""Export a child: one complete folder, which loads where lit_puzzle is not installed.

Reads a checkpoint folder (assembled, distilled or recovered) and optionally KV scales, a LoRA adapter, an MXFP4 parent,
and run.json files for the model card. Writes `run_dir/model`: config.json with `block_configs`, weights with an index,
generation config with every stop token, tokenizer and chat template, the modeling file, README.md (the model card) with
a plot, and SHA256SUMS. The folder is complete or does not exist.

Tensors that no setting changes are copied byte for byte from file to file. No code in an input folder is executed:
pickles and tokenizers with code are refused, and the modeling file is our own, not the checkpoint's.

Memory: headers and 16 MiB; with `experts: mxfp4` or `plain`, one expert matrix of a layer in both forms; with another
dtype or an adapter, one tensor in both. Disk: the tensors. Traffic: each byte is read and written once, and read once
more, usually from the page cache, for its checksum.

Source: format of the released gpt-oss-puzzle-88B, with the stop tokens and YaRN parameters that it lacks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_puzzle.child.folder import ChildFolder
from lit_puzzle.kv_cache.scales import META_FILE, KVScales, check_positive, check_shape, scales_identity
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.identity import checkpoint_identity, tokenizer_content, weights_identity
from lit_puzzle.model.layout import whole
from lit_puzzle.model.safetensors_file import DTYPES
from lit_puzzle.model.writer import atomic_folder
from lit_puzzle.run.folder import CONFIG, RECORD, is_complete, require_input
from lit_puzzle.run.identity import Identity, file_identity
from lit_puzzle.run.inputs import claim_inputs, record_output
from lit_puzzle.run.lineage import check_ancestors, training_runs
from lit_puzzle.serve import experts, stock
from lit_puzzle.serve import weights as steps
from lit_puzzle.serve.adapter import Adapter, merged
from lit_puzzle.serve.configs import puzzle_config, stock_config, with_storage
from lit_puzzle.serve.exported_folder import Export, results_of, write_folder
from lit_puzzle.serve.hub import check_upload, upload_folder
from lit_puzzle.serve.model_card import read_run
from lit_puzzle.serve.settings import Card, Storage, Upload
from lit_puzzle.serve.tokenizer_files import check_tokenizer, generation_settings
from lit_puzzle.serve.weights import Weights
from lit_puzzle.spec import Plan

FOLDER = "model"
COPIED_SCALES = "copied from the checkpoint, which may differ from the weights that they were calibrated on"
FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def export(
    run_dir: Path,
    checkpoint: Path,
    kv_scales: Path | None = None,
    adapter: Path | None = None,
    tokenizer: Path | None = None,
    storage: Storage = Storage(),  # noqa: B008  (frozen)
    card: Card = Card(),  # noqa: B008  (frozen)
    upload: Upload = Upload(),  # noqa: B008  (frozen)
) -> dict[str, float]:
    """Write a complete folder of a child to `run_dir/model`.

    Args:
        run_dir: run folder of this stage.
        checkpoint: folder of the child.
        kv_scales: run folder of recipes/calibrate_kv.yaml for this very checkpoint; None: the KV scales in the
            checkpoint are kept.
        adapter: folder of a PEFT LoRA adapter to be merged.
        tokenizer: folder of the tokenizer and chat template; None: the checkpoint.
        storage: format, experts and dtype of the folder.
        card: what the model card says that cannot be read from the folder.
        upload: whether and where the complete folder is uploaded.

    Returns:
        Parameters, weight bytes, files, layers with MXFP4 experts and with KV scales, copied and rounded experts and
        the relative error of rounding.

    Raises:
        ValueError: an input is missing, damaged or of another checkpoint; the format cannot represent the child; or
            the folder already exists.
    """
    check_upload(upload)
    for path in (*(card.training or ()), *card.evaluations.values()):
        read_run(path)
    child = ChildFolder.open(require_input(checkpoint, "checkpoint", "config.json"))
    source, plan = child.checkpoint, child.plan
    tokenizer = source.folder if tokenizer is None else require_input(tokenizer, "tokenizer", "tokenizer_config.json")
    check_tokenizer(tokenizer)
    weights, scales_from = _final_weights(source, adapter, kv_scales, rounded=storage.dtype == "stored")
    rounding = experts.Rounding()
    weights = _stored_as(weights, source, storage, _packed_parent(storage, plan), rounding)
    weights, config = _in_format(source, storage, weights, plan, kv_scales)
    config = _with_storage(source, config, weights, storage)
    settings = generation_settings(source.folder, tokenizer, config)
    exported = Export(storage.format, source, tokenizer, config, settings, weights, plan, scales_from, rounding)
    identity = checkpoint_identity(source)
    card = replace(card, training=training_runs(identity) if card.training is None else card.training)
    check_ancestors(identity, card.training or (), "card.training")
    claim_inputs(
        run_dir, {"checkpoint": identity} | _other_inputs(source, kv_scales, adapter, tokenizer, storage, card)
    )
    own_and_interrupted = (run_dir / CONFIG).is_file() and not is_complete(run_dir)
    with atomic_folder(run_dir / FOLDER, replace=own_and_interrupted) as scratch:
        facts = write_folder(scratch, exported, card)
    record_output(run_dir, FOLDER, Identity(str(run_dir / FOLDER), {"weights": facts.sizes.fingerprint}))
    upload_folder(run_dir / FOLDER, upload)
    return results_of(run_dir / FOLDER, facts)


def _other_inputs(
    source: Checkpoint, kv_scales: Path | None, adapter: Path | None, tokenizer: Path, storage: Storage, card: Card
) -> dict[str, Identity]:
    found = dict[str, Identity]()
    if kv_scales is not None:
        found["kv_scales"] = scales_identity(require_input(kv_scales, "folder of KV scales", META_FILE))
    if adapter is not None:
        found["adapter"] = file_identity(require_input(adapter, "adapter", "adapter_config.json"))
    if tokenizer != source.folder:
        found["tokenizer"] = Identity(str(tokenizer), tokenizer_content(tokenizer))
    if storage.mxfp4_parent is not None:
        found["storage.mxfp4_parent"] = weights_identity(
            require_input(storage.mxfp4_parent, "MXFP4 parent", "config.json")
        )
    runs = {f"card.training.{number}": path for number, path in enumerate(card.training or ())}
    runs |= {f"card.evaluations.{title}": path for title, path in card.evaluations.items()}
    return found | {name: file_identity(path, [RECORD] if path.is_dir() else None) for name, path in runs.items()}


def _final_weights(
    source: Checkpoint, adapter: Path | None, kv_scales: Path | None, rounded: bool
) -> tuple[Weights, str]:
    """Return the checkpoint's tensors with adapter and KV scales, and a description of where the scales come from."""
    weights, names = steps.stored_weights(source), source.family.layer
    own = [name for name in weights if name.endswith(names.kv_scales)]
    for name in own:
        check_positive(source.read(name).float(), name)
    if adapter is not None:
        if own or kv_scales is not None:
            raise ValueError(
                "KV scales are valid for the weights they were calibrated on, and an adapter changes them: export with "
                "the adapter alone, run recipes/calibrate_kv.yaml on that folder, and export it with the scales"
            )
        return merged(weights, Adapter.open(require_input(adapter, "adapter", "adapter_config.json")), rounded), ""
    if kv_scales is None:
        return weights, COPIED_SCALES if own else ""
    scales = KVScales.load(require_input(kv_scales, "folder of KV scales", META_FILE))
    check_scales(scales, source)
    found = f"method {scales.method} over {scales.tokens:,} tokens, rounding {scales.rounding}"
    return steps.with_kv_scales(weights, scales.tensors(), names), found


def check_scales(scales: KVScales, source: Checkpoint) -> None:
    """Check that KV scales are of this checkpoint and complete.

    Raises:
        ValueError: they are of another checkpoint, or a layer with full attention has none.
    """
    scales.check_checkpoint(source.fingerprint())
    check_shape(scales, source.num_layers, whole(source.config, "num_key_value_heads"))
    for layer, (found, (_, window)) in enumerate(zip(scales.layers, source.blocks, strict=True)):
        if found is None and window is None:
            raise ValueError(
                f"layer {layer} has full attention and no KV scale; only windowed layers may stay in bfloat16. Run "
                "recipes/calibrate_kv.yaml again"
            )


def _packed_parent(storage: Storage, plan: Plan | None) -> tuple[Checkpoint, Plan] | None:
    if storage.mxfp4_parent is None:
        return None
    if storage.experts != "mxfp4" or plan is None:
        raise ValueError(
            f"storage.mxfp4_parent needs storage.experts: mxfp4 (given: {storage.experts}) and the child's plan.json, "
            f"which lists the experts that were kept ({'missing' if plan is None else 'found'})"
        )
    parent = Checkpoint(require_input(storage.mxfp4_parent, "MXFP4 parent", "config.json"))
    experts.check_packed_parent(parent, plan)
    return parent, plan


def _stored_as(
    weights: Weights,
    source: Checkpoint,
    storage: Storage,
    parent: tuple[Checkpoint, Plan] | None,
    rounding: experts.Rounding,
) -> Weights:
    """Return the weights packed or unpacked and in their dtype; packing comes first: values are rounded once."""
    names = source.family.layer
    if storage.experts == "mxfp4":
        weights = experts.packed(weights, parent, rounding, names)
    elif storage.experts == "plain":
        dtype = DTYPES["BF16"] if storage.dtype == "stored" else FLOATS[storage.dtype]
        weights = experts.unpacked(weights, dtype, names)
    return weights if storage.dtype == "stored" else steps.in_dtype(weights, FLOATS[storage.dtype], names)


def _in_format(
    source: Checkpoint, storage: Storage, weights: Weights, plan: Plan | None, kv_scales: Path | None
) -> tuple[Weights, dict[str, Any]]:
    """Return weights and config.json in the format that was asked for."""
    config = puzzle_config(source)
    if storage.format == "puzzle":
        return weights, config
    if kv_scales is not None:
        raise ValueError(f"storage.format: {storage.format} cannot have KV scales; give --kv_scales=null")
    weights = steps.without_kv_scales(weights, source.family.layer)
    if storage.format == "stock":
        stock.check_stock(source.blocks, source.family)
        return weights, stock_config(config, source.blocks[0][0], source.blocks)
    stock.check_masked(source.blocks)
    kept, full_size = stock.positions(source.blocks, plan)
    config = stock_config(config, full_size, source.blocks)
    return stock.masked(weights, kept, full_size, source.family), config


def _with_storage(source: Checkpoint, config: dict[str, Any], weights: Weights, storage: Storage) -> dict[str, Any]:
    """Return the config with its entries about storage; its dtype is kept unless another one was asked for."""
    stated = config.get("dtype") or config.get("torch_dtype") or DTYPES[weights["model.embed_tokens.weight"].dtype]
    dtype = str(stated).removeprefix("torch.") if storage.dtype == "stored" else storage.dtype
    packed = steps.mxfp4_layers(weights, source.num_layers, source.family.layer)
    return with_storage(config, packed, source.num_layers, dtype)
