"""The trained tensors that a plan's blocks have in a library, under the names of a checkpoint.

Reads the library's folder; writes nothing. A combination of experts and window without a file of its own takes the
tensors of its two halves, whose damages the search has added. Memory: headers; tensors are views of mapped files.
Source: arXiv 2411.19146 (attention and feed-forward trained apart).
"""

from pathlib import Path

from torch import Tensor

from lit_puzzle.library.library import Library
from lit_puzzle.library.swap import check_trained, trained_tensors
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import layer_prefix
from lit_puzzle.spec import BlockSpec, Plan


def chosen_tensors(parent: Checkpoint, plan: Plan, folder: Path) -> dict[str, Tensor]:
    """The trained tensors of a plan's blocks by full name, as views of the library's files.

    Raises:
        ValueError: The library is of another parent, has no such block, or tensors that the parent has not.
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


def block_tensors(library: Library, folder: Path, layer: int, block: BlockSpec) -> dict[str, Tensor]:
    """The trained tensors of the candidate that is this block, or else of its halves, by their names inside the layer.

    Raises:
        ValueError: The layer has no such candidate, or a file does not fit it.
    """
    chosen = [candidate for candidate in library.layers[layer] if candidate.block == block]
    if not chosen:
        raise ValueError(
            f"{folder} has no candidate with the plan's {block.num_experts} experts and window {block.window_tokens} "
            f"in layer {layer}; give the library that the plan was searched in"
        )
    tensors: dict[str, Tensor] = {}
    for candidate in library.trained(layer, chosen[0]):  # halves have no tensor in common
        check_trained(folder, library.config, candidate)
        tensors |= trained_tensors(folder, candidate)
    return tensors
