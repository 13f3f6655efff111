"""Which blocks of a library are trained, which of their tensors, and the library that is written afterwards.

Reads a library's folder and the headers of its parent; writes a library's folder, whole or not at all: `library.json`
and a safetensors file `layer=L,NAME.safetensors` per trained block, in the dtypes of the parent, so that scoring and
assembly use the same values. Files of blocks that were not trained in this run are copied.

Sub-blocks apart: a layer with experts=8 and window=16 trains two halves, whatever the number of their combinations. A
combination has no tensors of its own; it is assembled from those of its halves, whose scores are added.
Together: every candidate, combinations included, is trained as a whole and has its own file.

Memory: one tensor while writing. Disk: bytes of the trained tensors in the parent's dtypes.
Source: arXiv 2411.19146 (blockwise local distillation, decoupled into attention and feed-forward).
"""

import dataclasses
import math
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lit_puzzle.distill.settings import BlockTrainingSettings
from lit_puzzle.library.library import Candidate, Library, parts
from lit_puzzle.library.trained_blocks import check_trained
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import family_of
from lit_puzzle.model.layout import layer_prefix, layer_shapes
from lit_puzzle.model.writer import atomic_folder
from lit_puzzle.spec import BlockSpec


@dataclass(frozen=True)
class SelectedBlock:
    """A block that is trained.

    Attributes:
        layer: index of the layer.
        name: name of the candidate that gets its tensors.
        block: kept experts and window.
        tensors: names inside the layer of the tensors that train.
        attention: whether its attention half differs from the parent's, or trains.
        experts: whether its expert half differs from the parent's, or trains.
    """

    layer: int
    name: str
    block: BlockSpec
    tensors: tuple[str, ...]
    attention: bool
    experts: bool

    @property
    def title(self) -> str:
        """Name of the block in logged metrics."""
        return f"{self.layer}/{self.name}"

    @property
    def file_name(self) -> str:
        """File of its tensors in the library's folder."""
        return f"layer={self.layer},{self.name}.safetensors"


def select_blocks(
    folder: Path,
    library: Library,
    settings: BlockTrainingSettings,
    trained_before: Mapping[tuple[int, str], Collection[str]],
) -> list[SelectedBlock]:
    """Return the blocks that train, layer by layer.

    Args:
        folder: folder of the library, for messages.
        library: the candidates.
        settings: layers, halves and tensors that train.
        trained_before: (layer, candidate) -> names of the tensors in its file; their training is continued.

    Raises:
        ValueError: layers or tensors that do not exist, halves that the library lacks, or nothing to train.
    """
    chosen = sorted(set(range(library.num_layers)) if settings.layers is None else set(settings.layers))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < library.num_layers:
        raise ValueError(f"layers {chosen} were given; the library has layers 0..{library.num_layers - 1}")
    tensors = list(layer_shapes(library.config, 1, mxfp4=False))
    for pattern in settings.tensors or []:
        if not any(fnmatchcase(name, pattern) for name in tensors):
            raise ValueError(f"tensors: {pattern!r} matches no tensor of a layer; there are {tensors}")
    selected = []
    for layer in chosen:
        for candidate in library.layers[layer][1:]:
            before = trained_before.get((layer, candidate.name), ())
            block = _select(library, layer, candidate, settings, before)
            selected += [] if block is None else [block]
    if not selected:
        raise ValueError(f"{folder} has nothing to train in layers {chosen} with tensors: {settings.tensors}")
    return selected


def _select(
    library: Library,
    layer: int,
    candidate: Candidate,
    settings: BlockTrainingSettings,
    before: Collection[str],
) -> SelectedBlock | None:
    """Return the block of a candidate; None if its halves train apart, or if none of its tensors trains."""
    experts, window = parts(candidate)
    names, apart = family_of(library.config).layer, settings.sub_blocks == "apart"
    if apart and experts and window:
        _check_halves(library, layer, candidate)
        return None
    changed_by_pruning = ([f"{names.router}.*"] if experts else []) + ([f"{names.attention}.*"] if window else [])
    patterns = changed_by_pruning if settings.tensors is None else settings.tensors
    tensors = layer_shapes(library.config, 1, mxfp4=False)
    trains = [name for name in tensors if any(fnmatchcase(name, pattern) for pattern in patterns) or name in before]
    if apart:
        trains = [name for name in trains if name.startswith(names.expert_half if experts else names.attention_half)]
    if not trains:
        return None
    halves = names.attention_half, names.expert_half
    attention, expert = (any(name.startswith(half) for name in trains) for half in halves)
    return SelectedBlock(
        layer, candidate.name, candidate.block, tuple(trains), attention or window is not None, expert or bool(experts)
    )


def _check_halves(library: Library, layer: int, candidate: Candidate) -> None:
    here = [other.name for other in library.layers[layer]]
    missing = [half for half in parts(candidate) if half not in here]
    if missing or candidate.weights is not None:
        why = f"the library lacks {missing}" if missing else "it has tensors of its own already"
        raise ValueError(
            f"layer {layer}, candidate {candidate.name!r} cannot be made of halves that train apart: {why}. "
            "Set training.sub_blocks: together."
        )


def layer_numbers(config: Mapping[str, Any], blocks: Iterable[SelectedBlock]) -> dict[int, int]:
    """Return the numbers that train in the blocks of each layer.

    Args:
        config: the plain dict of the parent's `config.json`.
        blocks: the blocks that train.
    """
    numbers: dict[int, int] = {}
    for block in blocks:
        shapes = layer_shapes(config, block.block.num_experts, mxfp4=False)
        own = sum(math.prod(shapes[name]) for name in block.tensors)
        numbers[block.layer] = numbers.get(block.layer, 0) + own
    return numbers


def check_blocks(folder: Path, parent: Checkpoint, library: Library, blocks: Iterable[SelectedBlock]) -> None:
    """Check the files that the library already has, and that the parent has the tensors that train.

    Raises:
        ValueError: tensors of another shape, or experts in MXFP4, which cannot be trained.
    """
    for block in blocks:
        check_trained(folder, library.config, library.candidate(block.layer, block.name))
        for name in block.tensors:
            if layer_prefix(block.layer) + name not in parent.tensors:
                raise ValueError(
                    f"tensors: {name} is not in {parent.folder} in this form (MXFP4 experts cannot be trained); "
                    "remove it from training.tensors"
                )


def write_library(
    target: Path,
    source: Path,
    library: Library,
    parent: Checkpoint,
    trained: Iterable[tuple[SelectedBlock, Mapping[str, Tensor]]],
    is_writer: bool,
) -> None:
    """Write the library with the trained blocks; every process iterates over `trained`, one writes.

    Args:
        target: folder to write; an existing one is replaced.
        source: folder that `library` was read from.
        library: its candidates.
        parent: checkpoint whose dtypes the tensors get.
        trained: blocks with their whole tensors by names inside the layer.
        is_writer: whether this process writes.
    """
    if not is_writer:
        for _ in trained:
            pass
        return
    with atomic_folder(target, replace=True) as scratch:
        files = {}
        for block, tensors in trained:
            files[block.layer, block.name] = block.file_name
            dtypes = {name: parent.read(layer_prefix(block.layer) + name).dtype for name in tensors}
            rounded = {name: tensor.to("cpu", dtypes[name]).contiguous() for name, tensor in tensors.items()}
            save_file(rounded, scratch / block.file_name)
        layers = []
        for layer, candidates in enumerate(library.layers):
            for candidate in candidates:
                if candidate.weights is not None and (layer, candidate.name) not in files:
                    shutil.copyfile(source / candidate.weights, scratch / candidate.weights)
            layers.append(
                tuple(dataclasses.replace(c, weights=files.get((layer, c.name), c.weights)) for c in candidates)
            )
        dataclasses.replace(library, layers=tuple(layers)).save(scratch)
