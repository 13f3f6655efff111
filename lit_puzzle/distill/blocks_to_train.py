"""Which blocks of a library are trained, which of their tensors, and the library that is written afterwards.

Reads a library's folder and the headers of its parent; writes a library's folder, whole or not at all: `library.json`
and a safetensors file `layer=L,NAME.safetensors` per trained block, in the dtypes of the parent, so that what is scored
is what is assembled. Files of blocks that were not trained now are copied.

Sub-blocks apart: a layer with experts=8 and window=16 trains two halves, whatever the number of their combinations; a
combination has no tensors of its own and is assembled from those of its halves, as their scores are added.
Together: every candidate, combinations included, is trained as a whole and has its own file.

Memory: one tensor while writing. Disk: bytes of the trained tensors in the parent's dtypes.
Source: arXiv 2411.19146 (blockwise local distillation, decoupled into attention and feed-forward).
"""

import dataclasses
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor

from lit_puzzle.library.library import Candidate, Library, parts
from lit_puzzle.library.trained_blocks import check_trained
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import layer_prefix, layer_shapes
from lit_puzzle.model.writer import atomic_folder
from lit_puzzle.spec import BlockSpec

SubBlocks = Literal["apart", "together"]
ATTENTION_HALF = ("input_layernorm.", "self_attn.")
EXPERT_HALF = ("post_attention_layernorm.", "mlp.")
ROUTER, ATTENTION = "mlp.router.*", "self_attn.*"  # what the surgery touches


@dataclass(frozen=True)
class BlockToTrain:
    """One block that is trained.

    Attributes:
        layer: Index of the layer.
        name: Name of the candidate whose file it will be.
        block: Kept experts and window.
        tensors: Names inside the layer of what trains.
        attention: Whether its attention half differs from the parent's, or trains.
        experts: Whether its expert half does.
    """

    layer: int
    name: str
    block: BlockSpec
    tensors: tuple[str, ...]
    attention: bool
    experts: bool

    @property
    def title(self) -> str:
        """As it is logged."""
        return f"{self.layer}/{self.name}"

    @property
    def file_name(self) -> str:
        """Of its tensors, in the library's folder."""
        return f"layer={self.layer},{self.name}.safetensors"


def choose_blocks(
    folder: Path,
    library: Library,
    layers: Collection[int] | None,
    sub_blocks: SubBlocks,
    patterns: Sequence[str] | None,
    trained_before: Mapping[tuple[int, str], Collection[str]],
) -> list[BlockToTrain]:
    """The blocks that train, layer by layer.

    Args:
        folder: Of the library, for messages.
        library: The candidates.
        layers: Only candidates of these layers; None: of all.
        sub_blocks: `apart` or `together`.
        patterns: Which tensors train, by their names inside a layer (`*` stands for anything); None: the router rows
            of a block that loses experts, the attention of one that gets a window.
        trained_before: (layer, candidate) -> names of the tensors in its file; they go on training.

    Raises:
        ValueError: Layers or tensors that are not there, halves that the library lacks, or nothing to train.
    """
    chosen = sorted(set(range(library.num_layers)) if layers is None else set(layers))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < library.num_layers:
        raise ValueError(f"layers {chosen} were given; the library has layers 0..{library.num_layers - 1}")
    names = list(layer_shapes(library.config, 1, mxfp4=False))
    for pattern in patterns or []:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"train: {pattern!r} matches no tensor of a layer; there are {names}")
    found = []
    for layer in chosen:
        for candidate in library.layers[layer][1:]:
            before = trained_before.get((layer, candidate.name), ())
            block = _block_to_train(library, layer, candidate, sub_blocks, patterns, names, before)
            found += [] if block is None else [block]
    if not found:
        raise ValueError(f"{folder} has nothing to train in layers {chosen} with train: {patterns}")
    return found


def _block_to_train(
    library: Library,
    layer: int,
    candidate: Candidate,
    sub_blocks: SubBlocks,
    patterns: Sequence[str] | None,
    names: Sequence[str],
    before: Collection[str],
) -> BlockToTrain | None:
    """None: a combination of halves that train apart, or one of whose tensors none is to train."""
    experts, window = parts(candidate)
    if sub_blocks == "apart" and experts and window:
        _check_halves(library, layer, candidate)
        return None
    touched = ([ROUTER] if experts else []) + ([ATTENTION] if window else [])
    wanted = touched if patterns is None else patterns
    trains = [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted) or name in before]
    if sub_blocks == "apart":
        trains = [name for name in trains if name.startswith(EXPERT_HALF if experts else ATTENTION_HALF)]
    if not trains:
        return None
    attention, expert = (any(name.startswith(half) for name in trains) for half in (ATTENTION_HALF, EXPERT_HALF))
    return BlockToTrain(
        layer, candidate.name, candidate.block, tuple(trains), attention or window is not None, expert or bool(experts)
    )


def _check_halves(library: Library, layer: int, candidate: Candidate) -> None:
    here = [other.name for other in library.layers[layer]]
    missing = [half for half in parts(candidate) if half not in here]
    if missing or candidate.weights is not None:
        why = f"the library lacks {missing}" if missing else "it has tensors of its own already"
        raise ValueError(
            f"layer {layer}, candidate {candidate.name!r} cannot be made of halves that train apart: {why}. "
            "Set sub_blocks: together."
        )


def check_blocks(folder: Path, parent: Checkpoint, library: Library, blocks: Iterable[BlockToTrain]) -> None:
    """Checks the files that are in the library already, and that the parent has what is to train.

    Raises:
        ValueError: Tensors of another shape, or experts in MXFP4, which cannot be trained.
    """
    for block in blocks:
        check_trained(folder, library.config, library.candidate(block.layer, block.name))
        for name in block.tensors:
            if layer_prefix(block.layer) + name not in parent.tensors:
                raise ValueError(
                    f"train: {name} is not in {parent.folder} in this form (MXFP4 experts stay as they are); "
                    "leave it out of train"
                )


def write_library(
    target: Path,
    source: Path,
    library: Library,
    parent: Checkpoint,
    trained: Iterable[tuple[BlockToTrain, Mapping[str, Tensor]]],
    is_writer: bool,
) -> None:
    """Writes the library with the trained blocks; every process iterates over `trained`, one writes.

    Args:
        target: Folder to write; replaced if it is there.
        source: Folder that `library` was read from.
        library: Its candidates.
        parent: Whose dtypes the tensors get.
        trained: Blocks with their whole tensors by names inside the layer.
        is_writer: Whether this process writes.
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
