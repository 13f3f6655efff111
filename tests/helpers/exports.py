"""Children and KV scales for tests of the export."""

from pathlib import Path

import torch

from lit_puzzle.child.assemble import assemble
from lit_puzzle.kv_cache.scales import KVScales, LayerScales, TensorScale
from lit_puzzle.model.checkpoint import Checkpoint, fingerprint
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.spec import BlockSpec, Plan

PARENT = PACKAGE / "assets" / "tiny_parent"
Blocks = list[tuple[tuple[int, ...], int | None]]


def make_child(folder: Path, blocks: Blocks, parent: Path = PARENT) -> Path:
    """Return the folder of a child of the tiny parent, made from the experts and windows of its layers."""
    experts = max(count for count, _ in Checkpoint(parent).blocks)
    Plan(fingerprint(parent), experts, tuple(BlockSpec(*block) for block in blocks)).save(folder / "plan.json")
    assemble(folder / "assembled", parent, plan=folder / "plan.json")
    return folder / "assembled" / "child"


UNIFORM: Blocks = [((0, 3, 5, 6, 9, 11, 12, 15), None if layer % 2 else 16) for layer in range(6)]
MIXED: Blocks = [
    ((1, 2, 7), 16),
    ((0, 3, 5, 6, 9), None),
    ((4,), 16),
    (tuple(range(16)), 16),
    ((2, 15), 16),
    ((3, 8, 10, 14), None),
]


def tensor_scale(amax: float) -> TensorScale:
    return TensorScale(torch.tensor(amax), torch.tensor(amax / 448), 0)


def made_up_scales(folder: Path, bf16_layers: tuple[int, ...] = ()) -> KVScales:
    """Return made-up scales of a checkpoint: layer l has 1 + l and 2 + l as largest key and value."""
    layers = [
        None if layer in bf16_layers else LayerScales(tensor_scale(1.0 + layer), tensor_scale(2.0 + layer))
        for layer in range(Checkpoint(folder).num_layers)
    ]
    return KVScales(fingerprint(folder), "gpt_oss_puzzle", "amax", "none", 100, tuple(layers))
