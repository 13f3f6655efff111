"""The tensors of trained candidates: read from a library's folder, checked against the layer they are for.

Reads the library's safetensors files, each opened once per call; writes nothing. A combination of experts and window
without a file of its own takes the tensors of its two halves, whose quality losses the search has added.
Memory: headers; tensors are views of mapped files. Source: arXiv 2411.19146 (attention and feed-forward trained apart).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_puzzle.library.library import Candidate, Library
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import layer_prefix, layer_shapes
from lit_puzzle.model.safetensors_file import SafetensorsFile, TensorInfo, read_header
from lit_puzzle.spec import BlockSpec, Plan


def check_trained(folder: Path, config: Mapping[str, Any], candidate: Candidate) -> None:
    """Check the trained tensors of a candidate by the header of their file.

    Args:
        folder: the library's folder.
        config: the parent's config.json.
        candidate: the candidate; one without trained tensors passes.

    Raises:
        ValueError: a tensor that a layer does not have, or of another shape; the message names it.
    """
    if candidate.weights is not None:
        path = folder / candidate.weights
        _check_shapes(path, config, candidate.block, read_header(path))


def trained_tensors(folder: Path, config: Mapping[str, Any], candidate: Candidate) -> dict[str, Tensor]:
    """Read the trained tensors of a candidate by their names inside the layer, as views of its mapped file.

    Args:
        folder: the library's folder.
        config: the parent's config.json.
        candidate: the candidate; one that is only pruned has none.

    Raises:
        ValueError: as `check_trained`.
    """
    if candidate.weights is None:
        return {}
    file = SafetensorsFile(folder / candidate.weights)
    _check_shapes(file.path, config, candidate.block, file.tensors)
    return {name: file.read(name) for name in file.tensors}


def trained_before(folder: Path, library: Library) -> dict[tuple[int, str], set[str]]:
    """Return the names of the tensors that candidates have trained, by layer and candidate.

    Args:
        folder: the library's folder.
        library: its candidates.

    Raises:
        ValueError: as `check_trained`.
    """
    return {
        (layer, candidate.name): set(trained_tensors(folder, library.config, candidate))
        for layer, candidates in enumerate(library.layers)
        for candidate in candidates
        if candidate.weights is not None
    }


def _check_shapes(path: Path, config: Mapping[str, Any], block: BlockSpec, tensors: Mapping[str, TensorInfo]) -> None:
    shapes = layer_shapes(config, block.num_experts, mxfp4=False)
    for name, info in tensors.items():
        if name not in shapes:
            raise ValueError(f"{path}: no layer has a tensor {name}; allowed: {sorted(shapes)}")
        if tuple(info.shape) != shapes[name]:
            raise ValueError(
                f"{path}: {name} has shape {tuple(info.shape)}; a layer with {block.num_experts} experts needs "
                f"{shapes[name]}"
            )


def block_tensors(library: Library, folder: Path, layer: int, block: BlockSpec) -> dict[str, Tensor]:
    """Read the trained tensors of the candidate that is this block, or else of its halves.

    Args:
        library: the library.
        folder: its folder.
        layer: index of the layer.
        block: the block; it must be one of the layer's candidates.

    Returns:
        Tensors by their names inside the layer, expert tensors with the kept rows only.

    Raises:
        ValueError: the layer has no such candidate, or a file does not fit it.
    """
    chosen = [candidate for candidate in library.layers[layer] if candidate.block == block]
    if not chosen:
        raise ValueError(
            f"{folder} has no candidate with the plan's {block.num_experts} experts and window {block.window_tokens} "
            f"in layer {layer}; give the library that the plan was searched in"
        )
    tensors: dict[str, Tensor] = {}
    for candidate in library.trained(layer, chosen[0]):  # halves have no tensor in common
        tensors |= trained_tensors(folder, library.config, candidate)
    return tensors


def plan_tensors(parent: Checkpoint, plan: Plan, folder: Path) -> dict[str, Tensor]:
    """Read the trained tensors of all blocks of a plan.

    Args:
        parent: the parent of the plan.
        plan: the plan.
        folder: the library that the plan was searched in.

    Returns:
        Tensors by their full names, as views of the library's files.

    Raises:
        ValueError: the library is of another parent, has no such block, or has tensors that the parent does not have.
    """
    library = Library.load(folder)
    library.check_parent(parent.fingerprint())
    found = {}
    for layer, block in enumerate(plan.blocks):
        for name, tensor in block_tensors(library, folder, layer, block).items():
            full_name = layer_prefix(layer) + name
            if full_name not in parent.tensors:
                raise ValueError(
                    f"{folder}: layer {layer} has a trained {name}, which {parent.folder} holds in another form (MXFP4 "
                    "experts are never re-quantized); train blocks without it"
                )
            found[full_name] = tensor
    return found
