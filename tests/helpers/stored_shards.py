"""What a distributed checkpoint of two processes stores."""

from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def names_in_halves(checkpoint: Path) -> set[str]:
    """Return the names of all that is stored; each must be a tensor in two shards of equal size."""
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    for name, tensor in stored.items():
        assert isinstance(tensor, TensorStorageMetadata), name
        assert [chunk.sizes.numel() * 2 for chunk in tensor.chunks] == [tensor.size.numel()] * 2, name
    return set(stored)
