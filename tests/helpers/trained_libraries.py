"""A library with one trained block, as files."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lit_puzzle.library.library import Candidate, Library, candidate_name, parent_blocks
from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.spec import BlockSpec

KEPT = (0, 2)


def one_trained(folder: Path, parent: Checkpoint, tensors: Mapping[str, Tensor]) -> Library:
    """Write and return a library in which layer 1 alone may become a block of two experts, with these tensors."""
    own = parent_blocks(parent.config)
    block = BlockSpec(KEPT, own[1].window_tokens)
    layers = [[Candidate("parent", block)] for block in own]
    layers[1].append(Candidate(candidate_name(own[1], block), block, "layer1.safetensors"))
    folder.mkdir()
    save_file(dict(tensors), folder / "layer1.safetensors")
    library = Library(parent.fingerprint(), max(b.num_experts for b in own), parent.config, tuple(map(tuple, layers)))
    library.save(folder)
    return library
