"""Export a child: one folder that is complete, which loads where lit_puzzle is not installed. A stage of its own.

Reads a checkpoint folder (assembled, distilled, recovered; gpt_oss or gpt_oss_puzzle) and, where they are named, KV
scales, a LoRA adapter, an MXFP4 parent, run.json files for the model card. Writes `run_dir/model`: config.json with
`block_configs`, weights with an index, generation config with every stop token, tokenizer and chat template, the
modeling file, README.md (the model card) with a picture, SHA256SUMS. The folder appears whole or not at all.

What is not asked to change is copied byte for byte, file to file. Nothing that a folder brings along is executed:
pickles and code of tokenizers are refused, modeling files of the checkpoint are not copied; ours is.

Memory: headers and 16 MiB; with `experts: mxfp4` or `plain`, one expert matrix of a layer in both forms; with another
dtype or an adapter, one tensor in both. Disk: the tensors. Traffic: each byte is read and written once, and read once
more, from the page cache where it still is, for its checksum.

Source: format of the released gpt-oss-puzzle-88B, with what its users found missing (stop tokens, YaRN parameters).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lit_puzzle.child.folder import ChildFolder
from lit_puzzle.kv_cache.kv_scales import KVScales, check_positive
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import KV_SCALES
from lit_puzzle.model.safetensors_file import DTYPES
from lit_puzzle.model.writer import atomic_folder
from lit_puzzle.run.folder import CONFIG, is_complete, require_input
from lit_puzzle.serve import experts as packing
from lit_puzzle.serve import stock
from lit_puzzle.serve import weights as steps
from lit_puzzle.serve.adapter import Adapter, merged
from lit_puzzle.serve.configs import puzzle_config, stock_config, with_storage
from lit_puzzle.serve.exported_folder import Exported, Form, results_of, write_folder
from lit_puzzle.serve.hub import check_upload, upload
from lit_puzzle.serve.model_card import Card, read_run
from lit_puzzle.serve.tokenizer_files import check_tokenizer, generation_settings
from lit_puzzle.serve.weights import Weights
from lit_puzzle.spec import Plan

FOLDER = "model"
CARRIED_SCALES = "carried over from the checkpoint, which may or may not be the one they were measured on"
PLAIN_CARD = Card()
Experts = Literal["stored", "plain", "mxfp4"]
Dtype = Literal["stored", "bfloat16", "float16", "float32"]
FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


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
    card: Card = PLAIN_CARD,
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
    if push_to_hub is not None:
        check_upload(push_to_hub)
    for path in (*card.training, *card.evaluations.values()):
        read_run(path)
    child = ChildFolder.open(require_input(checkpoint, "checkpoint"))
    source, plan = child.checkpoint, child.plan
    words = source.folder if tokenizer is None else require_input(tokenizer, "tokenizer")
    check_tokenizer(words)
    weights, scales_from = _final_weights(source, adapter, kv_scales)
    rounding = packing.Rounding()
    weights = _stored_as(weights, experts, dtype, _packed_parent(mxfp4_parent, experts, plan), rounding)
    weights, config = _in_form(source, format, weights, plan, kv_scales)
    config = _with_storage(config, weights, source.num_layers, dtype)
    settings = generation_settings(source.folder, words, config)
    exported = Exported(format, source.folder, words, config, settings, weights, plan, scales_from, rounding)
    own_and_interrupted = (run_dir / CONFIG).is_file() and not is_complete(run_dir)
    with atomic_folder(run_dir / FOLDER, replace=own_and_interrupted) as scratch:
        facts = write_folder(scratch, exported, card)
    if push_to_hub is not None:
        upload(run_dir / FOLDER, push_to_hub, private)
    return results_of(run_dir / FOLDER, facts)


def _final_weights(source: Checkpoint, adapter: Path | None, kv_scales: Path | None) -> tuple[Weights, str]:
    """The checkpoint's tensors with the adapter merged and KV scales, and where the scales come from."""
    weights = steps.stored_weights(source)
    own = [name for name in weights if name.endswith(KV_SCALES)]
    for name in own:
        check_positive(source.read(name).float(), name)
    if adapter is not None:
        if own or kv_scales is not None:
            raise ValueError(
                "KV scales hold for the weights they were measured on, and an adapter changes them: export with the "
                "adapter alone, run recipes/calibrate_kv.yaml on that folder, and export it with the scales"
            )
        return merged(weights, Adapter.open(require_input(adapter, "adapter"))), ""
    if kv_scales is None:
        return weights, CARRIED_SCALES if own else ""
    scales = KVScales.load(require_input(kv_scales, "folder of KV scales"))
    check_scales(scales, source)
    told = f"{scales.method} over {scales.tokens:,} tokens, rounding {scales.rounding}"
    return steps.with_kv_scales(weights, scales.tensors()), told


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


def _packed_parent(folder: Path | None, experts: Experts, plan: Plan | None) -> tuple[Checkpoint, Plan] | None:
    if folder is None:
        return None
    if experts != "mxfp4" or plan is None:
        raise ValueError(
            f"mxfp4_parent needs experts: mxfp4 (given: {experts}) and the child's plan.json, which says which of its "
            f"experts were kept ({'missing' if plan is None else 'there'})"
        )
    parent = Checkpoint(require_input(folder, "MXFP4 parent"))
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
        weights = packing.unpacked(weights, DTYPES["BF16"] if dtype == "stored" else FLOATS[dtype])
    return weights if dtype == "stored" else steps.in_dtype(weights, FLOATS[dtype])


def _in_form(
    source: Checkpoint, form: Form, weights: Weights, plan: Plan | None, kv_scales: Path | None
) -> tuple[Weights, dict[str, Any]]:
    """Weights and config.json in the format that was asked for."""
    config = puzzle_config(source)
    if form == "puzzle":
        return weights, config
    if kv_scales is not None:
        raise ValueError(f"format: {form} is for engines that know no KV scales; give --kv_scales=null")
    weights = steps.without_kv_scales(weights)
    if form == "stock":
        stock.check_stock(source.blocks)
        return weights, stock_config(config, source.blocks[0][0], source.blocks)
    stock.check_masked(source.blocks)
    rows, experts = stock.positions(source.blocks, plan)
    return stock.masked(weights, rows, experts), stock_config(config, experts, source.blocks)


def _with_storage(config: dict[str, Any], weights: Weights, num_layers: int, dtype: Dtype) -> dict[str, Any]:
    """The config with what it says of the files; a dtype that it states is kept unless another one was asked for."""
    stated = config.get("dtype") or config.get("torch_dtype") or DTYPES[weights["model.embed_tokens.weight"].dtype]
    name = str(stated).removeprefix("torch.") if dtype == "stored" else dtype
    return with_storage(config, steps.mxfp4_layers(weights, num_layers), num_layers, name)
