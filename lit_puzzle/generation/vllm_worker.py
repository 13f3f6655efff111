"""What vLLM's worker processes can do besides generating: read trained weights into a running model.

vLLM adds this class to its own worker (`worker_extension_cls`) in every process of tensor parallelism; each reads the
files and keeps its part. Calls go through `collective_rpc`. Reads the file of `SharedWeights` and checkpoint folders;
writes nothing. Memory: that of the plugin's loader, one tensor and one layer.
"""

from collections.abc import Callable
from pathlib import Path

from lit_puzzle.generation.trained_weights import completed
from lit_puzzle.model.checkpoint import Checkpoint


class WeightReader:
    """Methods for vLLM's worker."""

    reload_weights: Callable[..., None]  # the worker's own

    def read_trained(self, weights: str, folder: str) -> None:
        """Read the tensors of a file of `SharedWeights`, and the unchanged ones beside them from a folder."""
        self.reload_weights(weights_iterator=completed(Path(weights), Path(folder)))

    def read_folder(self, folder: str) -> None:
        """Read all tensors of a checkpoint folder."""
        checkpoint = Checkpoint(Path(folder))
        self.reload_weights(weights_iterator=((name, checkpoint.read(name)) for name in checkpoint.tensors))
