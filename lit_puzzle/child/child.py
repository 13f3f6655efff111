"""A child: a plan applied to its parent, as everything that the child's folder holds.

Reads the parent's headers and small files, and the trained tensors of the library where one is given. `Child.write`
writes a folder: weights, `config.json` with `block_configs`, the modeling file that its `auto_map` names, `plan.json`,
tokenizer, chat template and generation config, and the parent's generation lengths and KV scales where it has them.

Memory: headers, one trained tensor, and a buffer of 16 MiB where the kernel cannot copy from file to file. Disk: the
child's tensors. Traffic: each of their bytes is read and written once. MXFP4 experts are copied as bytes and never
re-quantized.

Source: arXiv 2602.11937 (pruned layers, YaRN factor). Format of the released gpt-oss-puzzle-88B.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_puzzle.child.folder import (
    CARRIED_FILES,
    OPTIONAL_TOKENIZER_FILES,
    PLAN_FILE,
    TEMPLATE_FILES,
    TOKENIZER_FILES,
)
from lit_puzzle.library.trained_blocks import plan_tensors
from lit_puzzle.model.blocks import block_config
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import family_of
from lit_puzzle.model.layout import layer_prefix, whole
from lit_puzzle.model.opening import load_config
from lit_puzzle.model.safetensors_file import DTYPES
from lit_puzzle.model.writer import MAX_SHARD_BYTES, Layout, StoredRows, write_checkpoint
from lit_puzzle.run.files import read_json, write_json
from lit_puzzle.spec import Plan


class Child:
    """A plan applied to its parent.

    Args:
        parent: the parent's checkpoint.
        plan: the blocks of the child; checked against the parent.
        rope_factor: new YaRN factor; None keeps the parent's.
        library: folder of the library that the plan was searched in, for the tensors of its trained blocks.

    Attributes:
        config: the child's config.json.
        trained: tensors that replace the parent's, by full name, as views of the library's files.

    Raises:
        ValueError: the plan or the library is not of this parent, or `rope_factor` does not apply to it.
    """

    def __init__(
        self, parent: Checkpoint, plan: Plan, rope_factor: float | None = None, library: Path | None = None
    ) -> None:
        check_plan(parent, plan)
        self.parent, self.plan = parent, plan
        blocks = [(block.num_experts, block.window_tokens) for block in plan.blocks]
        self.config = child_config(parent.config, blocks, rope_factor)
        self.trained = {} if library is None else plan_tensors(parent, plan, library)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Content of its generation_config.json."""
        return generation_config(self.parent.folder, self.config)

    def layout(self) -> Layout:
        """Return names, dtypes and shapes of its tensors: the parent's, with the plan's number of expert rows."""
        layout = {name: (info.dtype, info.shape) for name, info in self.parent.tensors.items()}
        for name, kept in self._kept_rows().items():
            if name in layout:
                dtype, shape = layout[name]
                layout[name] = (dtype, (len(kept), *shape[1:]))
        return layout

    def tensors(self) -> Iterator[tuple[str, StoredRows | Tensor]]:
        """Yield the full name of every tensor and where its bytes lie in the parent's files, or the trained tensor."""
        rows = self._kept_rows()
        for name, info in self.parent.tensors.items():
            if name in self.trained:
                yield name, self.trained[name].to(DTYPES[info.dtype])
            else:
                yield name, StoredRows(info, rows.get(name))

    def _kept_rows(self) -> dict[str, tuple[int, ...]]:
        """Full names of the tensors that have a row per expert -> the rows that are kept."""
        return {
            layer_prefix(layer) + name: block.experts
            for layer, block in enumerate(self.plan.blocks)
            for name in self.parent.family.layer.expert_rows
        }

    def write(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write the complete child into the empty `folder`.

        Args:
            folder: an empty folder.
            max_shard_bytes: largest file of weights.

        Raises:
            ValueError: the model does not accept the configuration.
        """
        write_json(folder / "config.json", self.config, indent=2)
        load_config(folder)
        write_json(folder / "generation_config.json", self.generation_config, indent=2)
        self.plan.save(folder / PLAN_FILE)
        copied = (*TOKENIZER_FILES, *TEMPLATE_FILES, *OPTIONAL_TOKENIZER_FILES, *CARRIED_FILES)
        for path in [self.parent.family.child.modeling_file, *(self.parent.folder / name for name in copied)]:
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        self.parent.check_checksums()
        write_checkpoint(folder, self.layout(), self.tensors(), max_shard_bytes)


def check_plan(parent: Checkpoint, plan: Plan) -> None:
    """Check that a plan is a plan of this parent and only takes away.

    Raises:
        ValueError: the plan is of another parent, has another number of layers, experts that the parent does not have,
            or a window wider than the parent's.
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


def child_config(
    parent_config: Mapping[str, Any], blocks: Sequence[tuple[int, int | None]], rope_factor: float | None = None
) -> dict[str, Any]:
    """Make a child's config.json from its parent's.

    Args:
        parent_config: the parent's config.json.
        blocks: number of experts and window (None: full attention) of every layer.
        rope_factor: new YaRN factor; max_position_embeddings becomes the original length times it.

    Raises:
        ValueError: `rope_factor` is given and the parent has no YaRN parameters, or it is not above 0.
    """
    config = {key: value for key, value in parent_config.items() if key != "per_layer_config"}
    config["block_configs"] = [block_config(count, window) for count, window in blocks]
    config["layer_types"] = ["full_attention" if window is None else "sliding_attention" for _, window in blocks]
    config |= family_of(parent_config).child.config_entries()
    return config if rope_factor is None else _with_rope_factor(config, rope_factor)


def _with_rope_factor(config: dict[str, Any], factor: float) -> dict[str, Any]:
    if not 0 < factor < float("inf"):
        raise ValueError(f"rope_factor must be above 0 and finite, got {factor}")
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    if rope.get("rope_type") != "yarn" or "original_max_position_embeddings" not in rope:
        raise ValueError(f"rope_factor needs a parent with YaRN parameters; its config.json has {key} = {rope}")
    length = whole(rope, "original_max_position_embeddings") * factor
    kept = {name: value for name, value in config.items() if name not in ("rope_parameters", "rope_scaling")}
    return {**kept, key: {**rope, "factor": float(factor)}, "max_position_embeddings": int(length)}


def generation_config(parent: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Make a generation config with every stop token: the parent's, the model's, and those of the family's vocabulary.

    A model that does not know all of its family's stop tokens does not stop after a tool call.

    Args:
        parent: the parent's folder; its generation_config.json is read if there is one.
        config: the model's config.json.
    """
    path = parent / "generation_config.json"
    settings = read_json(path) if path.is_file() else {"pad_token_id": config.get("pad_token_id")}
    stops: list[int] = []
    for value in (settings.get("eos_token_id"), config.get("eos_token_id")):
        stops += value if isinstance(value, list) else [] if value is None else [value]
    family = family_of(config)
    if config["vocab_size"] == family.vocab_size:
        stops += family.stop_tokens
    return {**settings, "eos_token_id": list(dict.fromkeys(stops)) or None}
