"""A weighted average of two checkpoints of the same architecture, as everything that its folder holds.

    x = round(s a + (1 - s) b)        s: share of the first, a and b in float32, rounded to the dtype of both

Tensors that are equal in both are copied byte for byte: what neither training changed stays as it is. MXFP4 experts
have no average in MXFP4: equal ones are copied as bytes, different ones are refused or, if wished, averaged in
bfloat16, in all layers, which takes about four times their space.

Reads both folders. `Average.write` writes a folder: the first one's files, with other weights; its `config.json` loses
`quantization_config` where experts are dequantized.

Memory: one tensor, and float32 copies of `CHUNK` values. Disk: the first folder's bytes. Traffic: both checkpoints are
read once to be compared, and what differs once more.
Source: arXiv 2602.11937, whose released model is the average of two RL recoveries; model soups, arXiv 2203.05482.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lit_puzzle.child.folder import PLAN_FILE
from lit_puzzle.child.settings import Packed, check_share
from lit_puzzle.model.checkpoint import INDEX_FILE, PICKLE_SUFFIXES, Checkpoint, weight_files
from lit_puzzle.model.config import essentials
from lit_puzzle.model.identity import tokenizer_content
from lit_puzzle.model.layout import layer_prefix, tensor_shapes
from lit_puzzle.model.loading import stored_names
from lit_puzzle.model.mxfp4 import expert_weight
from lit_puzzle.model.writer import MAX_SHARD_BYTES, Layout, StoredRows, write_checkpoint
from lit_puzzle.run.checksums import CHECKSUMS
from lit_puzzle.run.files import read_json, write_json

CHUNK = 1 << 24  # values that are added at a time
PACKED = ("_blocks", "_scales")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Average:
    """The average of two checkpoints.

    Args:
        first: opened by `open_merged`.
        second: of the same architecture.
        packed: what is done with MXFP4 experts that differ.

    Attributes:
        unpacks: whether experts are dequantized.

    Raises:
        ValueError: the two are not of the same architecture, tokenizer, plan and storage, have KV scales, or have
            different MXFP4 experts, which are refused.
    """

    def __init__(self, first: Checkpoint, second: Checkpoint, packed: Packed = "refuse") -> None:
        check_alike(first, second)
        self.first, self.second = first, second
        self._same: dict[str, bool] = {}  # tensors that were compared
        differing = next((name for name in first.tensors if name.endswith(PACKED) and not self._equal(name)), None)
        if differing is not None and packed == "refuse":
            raise ValueError(
                f"{differing} differs between {first.folder} and {second.folder}: MXFP4 experts have no average in "
                "MXFP4. Set mxfp4: dequantize for an average in bfloat16, about four times as large."
            )
        self.unpacks = differing is not None

    def layout(self) -> Layout:
        """Return names, dtypes and shapes of its tensors."""
        stored = self.first.tensors
        if not self.unpacks:
            return {name: (info.dtype, info.shape) for name, info in stored.items()}
        shapes = tensor_shapes(self.first.config)
        return {name: (stored[name].dtype if name in stored else "BF16", shape) for name, shape in shapes.items()}

    def tensors(self, share: float) -> Iterator[tuple[str, Tensor | StoredRows]]:
        """Yield the name of every tensor and its average, or where its bytes lie in the first checkpoint.

        Args:
            share: of the first checkpoint, from 0 to 1.
        """
        check_share("share", share)
        for name in self.layout():
            stored = stored_names(self.first, name)
            equal = all(self._equal(part) for part in stored)
            if equal and len(stored) == 1:
                yield name, StoredRows(self.first.tensors[name])
            else:
                yield name, weighted(_plain(self.first, stored), _plain(self.second, stored), 1.0 if equal else share)

    def write(self, folder: Path, share: float, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write the complete average into the empty `folder`."""
        source = self.first.folder
        weights = {path.name for path in weight_files(source)} | {INDEX_FILE, CHECKSUMS}
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in weights and path.suffix not in PICKLE_SUFFIXES:
                shutil.copyfile(path, folder / path.name)
        if self.unpacks:
            config = {key: value for key, value in self.first.config.items() if key != "quantization_config"}
            write_json(folder / "config.json", config, indent=2)
        self.first.check_checksums()
        self.second.check_checksums()
        write_checkpoint(folder, self.layout(), self.tensors(share), max_shard_bytes)

    def counts(self) -> dict[str, float]:
        """Return how many tensors are copied as they are, and how many are averaged."""
        names = list(self.layout())
        copied = sum(all(self._equal(part) for part in stored_names(self.first, name)) for name in names)
        return {"copied_tensors": float(copied), "averaged_tensors": float(len(names) - copied)}

    def _equal(self, name: str) -> bool:
        if name not in self._same:
            self._same[name] = torch.equal(self.first.view(name), self.second.view(name))
        return self._same[name]


def weighted(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Return share * first + (1 - share) * second, added in float32, in the dtype of both."""
    result = torch.empty_like(first, memory_format=torch.contiguous_format)
    parts = zip(result.view(-1).split(CHUNK), first.reshape(-1).split(CHUNK), second.reshape(-1).split(CHUNK))
    for target, a, b in parts:
        target.copy_(share * a.float() + (1 - share) * b.float())
    return result


def _plain(checkpoint: Checkpoint, stored: tuple[str, ...]) -> Tensor:
    """Return a checked tensor, dequantized if it is stored as blocks and scales."""
    parts = [checkpoint.read(name) for name in stored]
    return parts[0] if len(parts) == 1 else expert_weight(parts[0], parts[1])


def open_merged(folder: Path) -> Checkpoint:
    """Open a checkpoint; a folder that has an adapter only is refused by name.

    Raises:
        ValueError: the folder is a LoRA adapter, or no valid checkpoint.
    """
    adapter = next((name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if adapter is not None:
        raise ValueError(
            f"{folder} has {adapter}: it is a LoRA adapter, not a whole checkpoint. Average the `child` folders of the "
            "runs, in which adapters are merged, or merge it first (recipes/export.yaml, --adapter)."
        )
    return Checkpoint(folder)


def check_alike(first: Checkpoint, second: Checkpoint) -> None:
    """Check that two checkpoints differ in the values of their weights only.

    Raises:
        ValueError: they differ in architecture, kept experts, tokenizer or storage, or one of them has KV scales.
    """
    both = f"{first.folder} and {second.folder}"
    ours, theirs = essentials(first.config), essentials(second.config)
    differing = next((key for key in ours if ours[key] != theirs.get(key)), None)
    if differing is not None or first.config["model_type"] != second.config["model_type"]:
        raise ValueError(f"{both} are of different architectures ({differing or 'model_type'}); they have no average.")
    plans = [
        read_json(one.folder / PLAN_FILE) if (one.folder / PLAN_FILE).is_file() else None for one in (first, second)
    ]
    if plans[0] != plans[1]:
        raise ValueError(f"{both} have different plans ({PLAN_FILE}): their experts are not the same ones.")
    if tokenizer_content(first.folder).get("tokenizer") != tokenizer_content(second.folder).get("tokenizer"):
        raise ValueError(f"{both} have different tokenizers: the same token id means different texts.")
    scales = [layer_prefix(layer) + name for layer in range(first.num_layers) for name in first.family.layer.kv_scales]
    scaled = next((name for name in scales if name in first.tensors or name in second.tensors), None)
    if scaled is not None:
        raise ValueError(
            f"{scaled} is among the weights of {both}: KV scales belong to one set of weights. Average, then calibrate."
        )
    for name in sorted(first.tensors.keys() | second.tensors.keys()):
        stored = [one.tensors[name].dtype if name in one.tensors else "missing" for one in (first, second)]
        if stored[0] != stored[1]:
            raise ValueError(
                f"{name} is {stored[0]} in {first.folder} and {stored[1]} in {second.folder}; store both alike."
            )
