"""The parent's top-k logits on disk: a safetensors file for each shard of documents, and the rows of a batch.

Reads and writes `shard-00000.safetensors`, ...: `token_ids` (N, K) int32, `log_probs` (N, K) and `log_rest` (N) float16
or float32, `first` (D + 1) int64: the row of each document's first target, and at the end N. `top_logits.json` makes
the folder complete: fingerprint of the parent, identity of the documents, K and precision. Definitions of the numbers:
`lit_puzzle.distill.top_logits`.

Memory: files are mapped, for reading and for writing; a reader copies the rows of one batch. Disk: `disk_bytes`.

Shapes: D documents and N targets of a shard or a batch, K tokens kept, B rows and T tokens of a packed batch.
"""

import json
import math
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lit_puzzle.data.batches import PackedBatch
from lit_puzzle.data.document_files import DocumentFolder
from lit_puzzle.data.packing import Integers
from lit_puzzle.distill.losses import TopKLogits
from lit_puzzle.run.files import read_json, write_json
from lit_puzzle.run.folder import require_input

RECORD_FILE = "top_logits.json"
ALIGNMENT = 64
Precision = Literal["float16", "float32"]
CODES = {"int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32"}


def file_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{number:05d}.safetensors"


def disk_bytes(targets: int, documents: int, shards: int, top_k: int, precision: Precision) -> int:
    """Return the size of all files together, headers (at most 512 bytes each) included."""
    size = np.dtype(precision).itemsize
    return targets * (top_k * (4 + size) + size) + 8 * (documents + shards) + 512 * shards


def check_disk(folder: Path, needed: int) -> None:
    """Check that the disk has room for a number of bytes.

    Raises:
        ValueError: too little space; the message gives both sizes.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder}: top-k logits need {needed / 2**30:.2f} GiB, the disk has {free / 2**30:.2f} GiB left. "
            "Choose a smaller top_k, float16, or fewer documents."
        )


@contextmanager
def new_shard(path: Path, first: Integers, top_k: int, precision: Precision) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield mapped arrays to fill; the file gets its name, synced to disk, when the body ends without an error.

    Args:
        path: file to write.
        first: (D + 1) row of each document's first target, and at the end N; written at once.
        top_k: K.
        precision: precision of the log-probabilities.

    Yields:
        `token_ids`, `log_probs`, `log_rest`.
    """
    targets = int(first[-1])
    layout = {
        "first": ("int64", first.shape),
        "token_ids": ("int32", (targets, top_k)),
        "log_probs": (precision, (targets, top_k)),
        "log_rest": (precision, (targets,)),
    }
    header, places = _header(layout)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(header)
        stream.truncate(max(end for _, end in places.values()))
    arrays = {
        name: np.memmap(partial, dtype, "r+", places[name][0], shape)
        for name, (dtype, shape) in layout.items()
        if places[name][0] < places[name][1]
    }
    arrays["first"][:] = first
    yield {name: array for name, array in arrays.items() if name != "first"}
    for array in arrays.values():
        array.flush()
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(path)


def _header(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the header of a safetensors file, widest numbers first, and each tensor's first and last byte in it."""
    spans, end = {}, 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        spans[name] = (begin, end)
    entries = {
        name: {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": list(spans[name])}
        for name, (dtype, shape) in layout.items()
    }
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: (data + a, data + b) for name, (a, b) in spans.items()}


def write_record(folder: Path, fingerprint: str, documents: DocumentFolder, top_k: int, precision: Precision) -> None:
    """Write the record, which makes the folder complete."""
    record = {
        "fingerprint": fingerprint,
        "documents": documents.identity,
        "top_k": top_k,
        "precision": precision,
    }
    write_json(folder / RECORD_FILE, record)


def rest_mass(folder: Path, shards: int) -> float:
    """Return the probability of the tokens that were not kept, summed over all targets."""
    files = (safe_open(folder / file_name(number), framework="pt") for number in range(shards))
    return sum(float(file.get_tensor("log_rest").double().exp().sum()) for file in files)


class TopLogits:
    """A complete folder of the parent's top-k logits, mapped into memory.

    Args:
        folder: `top_logits/` of a run.
        documents: documents of the packed batches.

    Attributes:
        folder: the folder.
        record: content of its `top_logits.json`: fingerprint (of the parent), documents, top_k, precision.

    Raises:
        ValueError: a folder that is missing, incomplete or damaged, or computed for other documents.
    """

    def __init__(self, folder: Path, documents: DocumentFolder) -> None:
        folder = require_input(folder, "folder of the parent's top-k logits", RECORD_FILE)
        self.record = read_json(folder / RECORD_FILE)
        for key in ("fingerprint", "documents", "top_k"):
            if key not in self.record:
                raise ValueError(f"{folder / RECORD_FILE} has no {key}. Compute the logits again.")
        if self.record["documents"] != documents.identity:
            raise ValueError(
                f"{folder} was computed for other documents than {documents.folder}. Compute it for these."
            )
        self.folder = folder
        self._first_document = documents.first
        self._files = [_opened(folder / file_name(n), self.record["top_k"]) for n in range(documents.num_shards)]
        self._first_row = [file.get_tensor("first") for file in self._files]

    def check_parent(self, fingerprint: str) -> None:
        """Check that the logits are those of the parent with this fingerprint.

        Raises:
            ValueError: logits of another parent.
        """
        if self.record["fingerprint"] != fingerprint:
            raise ValueError(
                f"{self.folder} was computed by the model {self.record['fingerprint']}, but the child's plan.json is "
                f"of the parent {fingerprint}. Compute it with that parent, or remove plan.json to distill from this "
                "model."
            )

    def for_batch(self, batch: PackedBatch) -> TopKLogits:
        """Return the logits at a packed batch's targets, in the order of `batch["loss_mask"].nonzero()`.

        Args:
            batch: `document_ids` and `loss_mask` of a packed batch, whose documents may be cut off at their ends.

        Returns:
            Token ids (N, K) int64 and logs (N, K), (N) float32, on the batch's device.
        """
        mask_BT = batch["loss_mask"]
        numbers, targets = torch.unique_consecutive(batch["document_ids"][mask_BT].cpu(), return_counts=True)
        spans = [self._rows(*pair) for pair in zip(numbers.tolist(), targets.tolist(), strict=True)]
        with torch.autocast("cpu", enabled=False):  # which refuses to join float16
            columns = {
                name: torch.cat([self._files[n].get_slice(name)[begin:end] for n, begin, end in spans])
                if spans
                else self._files[0].get_slice(name)[:0]
                for name in ("token_ids", "log_probs", "log_rest")
            }
        ids_NK, log_p_NK, log_rest_N = (column.to(mask_BT.device) for column in columns.values())
        return TopKLogits(ids_NK.long(), log_p_NK.float(), log_rest_N.float())

    def _rows(self, number: int, targets: int) -> tuple[int, int, int]:
        """Return shard, first row and end of the first `targets` targets of a document."""
        shard = bisect_right(self._first_document, number) - 1
        begin = int(self._first_row[shard][number - self._first_document[shard]])
        return shard, begin, begin + targets


def _opened(path: Path, top_k: object) -> Any:
    """Return an open file of logits, whose header has been checked.

    Raises:
        ValueError: it is missing or damaged, or has another number of logits than its record says.
    """
    try:
        file = safe_open(path, framework="pt")
        rows, found = file.get_slice("token_ids").get_shape()
        shapes = [file.get_slice(name).get_shape() for name in ("log_probs", "log_rest")]
        file.get_slice("first")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}). Compute the logits again.") from error
    if found != top_k or shapes != [[rows, found], [rows]]:
        raise ValueError(f"{path} has {found} logits a target, {RECORD_FILE} says top_k {top_k!r}. Compute them again.")
    return file
