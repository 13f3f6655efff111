"""Trained weights on their way to an engine: a file in shared memory that holds only the tensors that train.

One process of a machine writes the file, tensor by tensor; the engines of that machine map it. Beside each other in an
engine's reload are then (`completed`)

    sent        from this file                                        a few per cent of a model whose experts are frozen
    unchanged   from the folder that the engine started from          vLLM rebuilds a layer from all of its tensors
    left out    kinds of which nothing is sent: experts, router, KV scales; the engine keeps what it has

The file has no name in any folder (memfd): it ends with the process that wrote it, however that ends.

Memory of a machine: the sent tensors once, in the dtype of the engine; of the writer, one whole tensor.
Source: the safetensors format.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.family import GPT_OSS
from lit_puzzle.model.layout import Shape
from lit_puzzle.model.safetensors_file import DTYPE_CODES, SafetensorsFile
from lit_puzzle.model.values import check_computed

NAMES = GPT_OSS.layer
KV_SCALES = tuple(f".{name}" for name in NAMES.kv_scales)
FROZEN = (f".{NAMES.experts}.", f".{NAMES.router}.", *KV_SCALES)  # kinds of tensors that a reload may leave out
ALIGNMENT = 64


class SharedWeights:
    """A safetensors file in shared memory whose tensors are written again after every update.

    Args:
        shapes: of the tensors, by their names in the checkpoint.
        dtype: in which they are stored.

    Attributes:
        path: under which processes of this machine and user open it, as long as this process lives.
        num_bytes: of all tensors.
    """

    def __init__(self, shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
        self.dtype, self._begins = dtype, {}
        header, begin = {}, 0
        for name, shape in shapes.items():
            end = begin + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            self._begins[name], begin = begin, end
        raw = json.dumps(header).encode()
        raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
        self.num_bytes, self._data = begin, 8 + len(raw)
        self._file = os.fdopen(os.memfd_create("trained_weights"), "r+b", buffering=0)
        self._file.truncate(self._data + begin)
        os.pwrite(self._file.fileno(), len(raw).to_bytes(8, "little") + raw, 0)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor in its place.

        Raises:
            ValueError: values that are not finite, in the dtype in which they are stored.
        """
        rounded = tensor.detach().to("cpu", self.dtype).contiguous()
        check_computed(name, rounded)
        left = memoryview(rounded.flatten().view(torch.uint8).numpy().data)
        place = self._data + self._begins[name]
        while left:
            written = os.pwrite(self._file.fileno(), left, place)
            left, place = left[written:], place + written

    def close(self) -> None:
        """Free the memory."""
        self._file.close()


def completed(weights: Path, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield what an engine reloads: sent tensors, and beside them the unchanged ones of a folder.

    Args:
        weights: file of `SharedWeights`.
        folder: checkpoint from which the engine started.

    Raises:
        ValueError: a sent tensor that the folder does not have, or values that are not finite.
    """
    sent, checkpoint = SafetensorsFile(weights), Checkpoint(folder)
    unknown = sorted(set(sent.tensors) - set(checkpoint.tensors))
    if unknown:
        raise ValueError(f"{unknown[0]} was trained; {folder} has no tensor of that name.")
    absent = [kind for kind in FROZEN if not any(kind in name for name in sent.tensors)]
    for name in checkpoint.tensors:
        if name in sent.tensors:
            yield name, sent.read(name)
        elif not any(kind in name for kind in absent):
            yield name, checkpoint.read(name)
