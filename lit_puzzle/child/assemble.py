"""Assemble a child: a plan and a parent checkpoint become a child checkpoint, a stage of its own.

Reads the parent's folder and a plan (`plan.json`), or makes the plan from an importance folder and two settings; and,
where it is named, a library, whose trained tensors take the place of the parent's in the layers that the plan gives
their block. A combination of experts and window without a file of its own takes the tensors of its two halves.
Writes `run_dir/child`: weights, `config.json` of type gpt_oss_puzzle with the modeling file it names in `auto_map`,
`plan.json`, tokenizer, chat template and generation config, and the parent's generation lengths and KV scales where
it has them. The folder appears whole or not at all, and every time anew.

Memory: headers, one trained tensor, and a buffer of 16 MiB where the kernel cannot copy from file to file. Disk: the
child's tensors. Traffic: each of their bytes is read and written once. MXFP4 experts are moved as bytes and never
re-quantized.

Source: arXiv 2602.11937 (pruned layers, YaRN factor). Format of the released gpt-oss-puzzle-88B.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_puzzle.importance.importance_file import Importance
from lit_puzzle.library.trained_blocks import chosen_tensors
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.gpt_oss import GptOssPuzzleConfig
from lit_puzzle.model.layout import EXPERT_ROWS, count_parameters, kv_values, layer_prefix, whole
from lit_puzzle.model.safetensors_file import DTYPES, read_json
from lit_puzzle.model.writer import MAX_SHARD_BYTES, Layout, StoredRows, atomic_folder, write_checkpoint
from lit_puzzle.run.folder import require_input
from lit_puzzle.spec import BlockSpec, Plan

MODELING_FILE = Path(__file__).parents[1] / "model" / "gpt_oss.py"
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_lengths.json",
    "LICENSE",
    "USAGE_POLICY",
)
GPT_OSS_VOCABULARY = 201088
GPT_OSS_STOP_TOKENS = (200002, 199999, 200012)  # <|return|>, <|endoftext|>, <|call|>
CONTEXT_TOKENS = 131072  # where KV bytes of parent and child are compared


def assemble(
    run_dir: Path,
    parent: Path,
    plan: Path | None = None,
    importance: Path | None = None,
    experts: int | list[int] | None = None,
    windows: dict[int, int] | None = None,
    rope_factor: float | None = None,
    library: Path | None = None,
) -> dict[str, float]:
    """Make a child of `parent` in `run_dir/child`.

    Args:
        run_dir: Run folder of this stage; a child that is already in it is replaced.
        parent: Checkpoint folder, gpt_oss or gpt_oss_puzzle.
        plan: A plan.json. Without it, the three settings below make the plan.
        importance: Folder of importance scores of this very parent.
        experts: How many experts stay in every layer, or a list with a number per layer; default: all.
        windows: Layer -> sliding window in tokens, for the layers whose attention gets a (smaller) window.
        rope_factor: New YaRN factor; max_position_embeddings becomes the original length times it. The paper raises 32
            to 56 to steady retrieval over 128K tokens, which fewer full-attention layers are left to do.
        library: Folder of the library that the plan was searched in, for the tensors of its trained blocks.

    Returns:
        Parameters, experts, full-attention layers, weight bytes and KV values at 128K tokens of parent and child, and
        the ratios.

    Raises:
        ValueError: When plan, importance, library and parent do not belong together, or the settings are
            contradictory.
    """
    source = Checkpoint(require_input(parent, "parent checkpoint"))
    if plan is not None:
        if (importance, experts, windows) != (None, None, None):
            raise ValueError("plan and importance/experts/windows exclude each other: a plan says all of it; drop one")
        chosen = Plan.load(require_input(plan, "plan"))
    else:
        chosen = plan_from_importance(source, importance, experts, windows or {})
    check_plan(source, chosen)
    config = child_config(source.config, chosen, rope_factor)
    if plan is not None and library is None:
        _refuse_to_lose_training(plan)
    trained = {} if library is None else chosen_tensors(source, chosen, require_input(library, "block library"))
    run_dir.mkdir(parents=True, exist_ok=True)
    if (run_dir / "child").resolve() == source.folder.resolve():
        raise ValueError(f"{source.folder} would be replaced by its own child; choose another run_dir")
    with atomic_folder(run_dir / "child", replace=True) as scratch:
        write_child(scratch, source, chosen, config, trained=trained)
    return summarize(source, Checkpoint(run_dir / "child"))


def _refuse_to_lose_training(plan: Path) -> None:
    record = read_json(plan)
    if record.get("trained_files"):
        raise ValueError(
            f"{plan} was searched among trained blocks ({len(record['trained_files'])} files of {record['library']}); "
            f"without them the child is another one. Add --library={record['library']}"
        )


def plan_from_importance(
    parent: Checkpoint, importance: Path | None, experts: int | list[int] | None, windows: Mapping[int, int]
) -> Plan:
    """A plan by two settings: the number of experts (the most important ones stay) and windows.

    Args:
        parent: The parent.
        importance: Folder with its importance scores; only needed when experts go.
        experts: Number that stays in every layer, or one number per layer; None keeps all.
        windows: Layer -> window in tokens; other layers keep theirs.

    Raises:
        ValueError: When experts are to go without importance, scores are of another parent or not finite, or numbers
            fit no layer.
    """
    if experts is None and importance is not None:
        raise ValueError("importance is given without experts; say how many experts stay in each layer")
    unknown = sorted(set(windows) - set(range(parent.num_layers)))
    if unknown:
        raise ValueError(f"windows names layers {unknown}; the parent has layers 0..{parent.num_layers - 1}")
    kept = tuple(tuple(range(count)) for count, _ in parent.blocks)
    fingerprint = parent.fingerprint()
    if experts is not None:
        if importance is None:
            raise ValueError("experts is given without importance; name the run folder of recipes/importance.yaml")
        scores = Importance.load(require_input(importance, "expert importance"))
        scores.check_parent(fingerprint)
        _check_finite(scores)
        kept = scores.keep([experts] * parent.num_layers if isinstance(experts, int) else experts)
    blocks = [BlockSpec(kept[layer], windows.get(layer, window)) for layer, (_, window) in enumerate(parent.blocks)]
    return Plan(fingerprint, max(count for count, _ in parent.blocks), tuple(blocks))


def _check_finite(importance: Importance) -> None:
    for layer, scores_E in enumerate(importance.scores):
        if not torch.isfinite(scores_E).all():
            raise ValueError(f"the importance scores of layer {layer} are not all finite: {scores_E.tolist()}")


def check_plan(parent: Checkpoint, plan: Plan) -> None:
    """Check that a plan is one of this parent and only takes away.

    Raises:
        ValueError: For another parent's plan, another number of layers, experts that are not there, or a wider window.
    """
    if plan.parent_fingerprint != parent.fingerprint():
        raise ValueError(
            f"the plan is of the parent {plan.parent_fingerprint}, but {parent.folder} is {parent.fingerprint()}: "
            "expert indices would mean other experts; use the parent that the plan was made from"
        )
    if plan.num_layers != parent.num_layers:
        raise ValueError(f"the plan has {plan.num_layers} layers, the parent {parent.num_layers}")
    for layer, (block, (experts, window)) in enumerate(zip(plan.blocks, parent.blocks, strict=True)):
        if block.experts[-1] >= experts:
            raise ValueError(f"the plan keeps expert {block.experts[-1]} of layer {layer}, which has {experts}")
        if window is not None and (block.window_tokens is None or block.window_tokens > window):
            raise ValueError(
                f"the plan gives layer {layer} the window {block.window_tokens}, wider than the parent's {window}; "
                "a child can only see less"
            )


def child_config(parent_config: Mapping[str, Any], plan: Plan, rope_factor: float | None) -> dict[str, Any]:
    """The child's config.json: the parent's, with the plan's blocks and, when asked for, another YaRN factor.

    Raises:
        ValueError: When `rope_factor` is given and the parent has no YaRN parameters, or it is not above 0.
    """
    config = {key: value for key, value in parent_config.items() if key != "per_layer_config"}
    config["model_type"] = "gpt_oss_puzzle"
    config["architectures"] = ["GptOssPuzzleForCausalLM"]
    config["block_configs"] = plan.block_configs()
    windows = [block.window_tokens for block in plan.blocks]
    config["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
    module = MODELING_FILE.stem
    config["auto_map"] = {
        "AutoConfig": f"{module}.GptOssPuzzleConfig",
        "AutoModelForCausalLM": f"{module}.GptOssPuzzleForCausalLM",
    }
    return config if rope_factor is None else _with_rope_factor(config, rope_factor)


def _with_rope_factor(config: dict[str, Any], factor: float) -> dict[str, Any]:
    if not 0 < factor < float("inf"):
        raise ValueError(f"rope_factor must be above 0 and finite, got {factor}")
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    if rope.get("rope_type") != "yarn" or "original_max_position_embeddings" not in rope:
        raise ValueError(f"rope_factor needs a parent with YaRN parameters; its config.json has {key} = {rope}")
    length = whole(rope, "original_max_position_embeddings") * factor
    return {**config, key: {**rope, "factor": float(factor)}, "max_position_embeddings": int(length)}


def generation_config(parent: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The parent's generation config with every stop token: its own, the model's, and those of a gpt-oss vocabulary.

    Without <|call|> (200012) tool calls of a gpt-oss child run on.
    """
    path = parent / "generation_config.json"
    settings = read_json(path) if path.is_file() else {"pad_token_id": config.get("pad_token_id")}
    stops: list[int] = []
    for value in (settings.get("eos_token_id"), config.get("eos_token_id")):
        stops += value if isinstance(value, list) else [] if value is None else [value]
    if config["vocab_size"] == GPT_OSS_VOCABULARY:
        stops += GPT_OSS_STOP_TOKENS
    return {**settings, "eos_token_id": list(dict.fromkeys(stops)) or None}


def write_child(
    folder: Path,
    parent: Checkpoint,
    plan: Plan,
    config: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trained: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a complete child folder into the empty `folder`, with trained tensors (by full name) where there are some.

    Raises:
        ValueError: When the configuration is not one the model takes.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    GptOssPuzzleConfig.from_pretrained(folder)
    settings = generation_config(parent.folder, config)
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    plan.save(folder / "plan.json")
    for path in [MODELING_FILE, *(parent.folder / name for name in COPIED_FILES)]:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    write_checkpoint(folder, child_layout(parent, plan), child_tensors(parent, plan, trained or {}), max_shard_bytes)


def child_layout(parent: Checkpoint, plan: Plan) -> Layout:
    """Names, dtypes and shapes of the child's tensors: the parent's, with the plan's number of expert rows."""
    layout = {name: (info.dtype, info.shape) for name, info in parent.tensors.items()}
    for layer, block in enumerate(plan.blocks):
        for name in EXPERT_ROWS:
            full_name = layer_prefix(layer) + name
            if full_name in layout:
                dtype, shape = layout[full_name]
                layout[full_name] = (dtype, (block.num_experts, *shape[1:]))
    return layout


def child_tensors(
    parent: Checkpoint, plan: Plan, trained: Mapping[str, Tensor]
) -> Iterator[tuple[str, StoredRows | Tensor]]:
    """Full name of everything the child has, and where in the parent's files its bytes lie, unless it was trained."""
    rows = {
        layer_prefix(layer) + name: block.experts for layer, block in enumerate(plan.blocks) for name in EXPERT_ROWS
    }
    for name, info in parent.tensors.items():
        yield name, trained[name].to(DTYPES[info.dtype]) if name in trained else StoredRows(info, rows.get(name))


def summarize(parent: Checkpoint, child: Checkpoint) -> dict[str, float]:
    """Headline numbers of a child beside its parent."""
    results: dict[str, float] = {}
    for name, checkpoint in (("parent", parent), ("child", child)):
        results[f"parameters/{name}"] = count_parameters(checkpoint.config)
        results[f"experts/{name}"] = sum(count for count, _ in checkpoint.blocks)
        results[f"full_attention_layers/{name}"] = sum(window is None for _, window in checkpoint.blocks)
        results[f"weight_bytes/{name}"] = sum(info.num_bytes for info in checkpoint.tensors.values())
        results[f"kv_values_128k/{name}"] = kv_values(checkpoint.config, CONTEXT_TOKENS)
    for quantity in ("parameters", "weight_bytes", "kv_values_128k"):
        results[f"{quantity}/ratio"] = results[f"{quantity}/child"] / results[f"{quantity}/parent"]
    return results
