"""Packed sequences on disk, mapped into memory, so that all processes of a machine read the same pages.

Writes and reads a folder with `input_ids.npy` (S, T) int32, `loss_mask.npy` (S, T) uint8 and `documents.npy` (D, 4)
int64: number, sequence, first place and length of every document, in the order in which they lie.

Memory: while writing, one shard of documents and 160 bytes a document; while reading, one batch and the system's cache
of the files. Disk: 5 S T + 32 D bytes.

Shapes: D documents, S sequences, B sequences of a batch, T tokens of a sequence.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from lit_puzzle.data.batches import PackedBatch
from lit_puzzle.data.document_files import DocumentFolder
from lit_puzzle.data.packing import Integers, pack, restarting_positions
from lit_puzzle.data.packing_settings import PackingMethod

NOTHING = -1  # in place of a sequence's number: a row of padding


def write_packed(
    target: Path,
    documents: DocumentFolder,
    numbers_D: Integers,
    lengths_D: Integers,
    sequence_tokens: int,
    method: PackingMethod,
) -> dict[str, int | float]:
    """Pack documents and write them.

    Args:
        target: folder to make.
        documents: folder of the documents.
        numbers_D: numbers of the documents, in the order in which they are placed.
        lengths_D: tokens of each that count; the rest is cut off.
        sequence_tokens: tokens of a sequence.
        method: how they are placed.

    Returns:
        sequences, documents, tokens, targets, and efficiency (share of places that hold a document's token).
    """
    sequences_D, starts_D = pack(lengths_D, sequence_tokens, method)
    num_sequences = int(sequences_D.max()) + 1
    table_D4 = np.stack([numbers_D, sequences_D, starts_D, lengths_D], axis=1)
    target.mkdir(parents=True)
    shape = (num_sequences, sequence_tokens)
    ids_ST = open_memmap(target / "input_ids.npy", mode="w+", dtype=np.int32, shape=shape)
    mask_ST = open_memmap(target / "loss_mask.npy", mode="w+", dtype=np.uint8, shape=shape)
    by_number_D4 = table_D4[np.argsort(numbers_D)]
    edges = np.searchsorted(by_number_D4[:, 0], documents.first)
    for shard_number, (begin, end) in enumerate(pairwise(edges.tolist())):
        shard = documents.shard(shard_number)
        for number, sequence, start, length in by_number_D4[begin:end].tolist():
            source = shard.offsets[number - documents.first[shard_number]]
            ids_ST[sequence, start : start + length] = shard.ids_N[source : source + length]
            mask_ST[sequence, start : start + length] = shard.mask_N[source : source + length]
    ids_ST.flush()
    mask_ST.flush()
    np.save(target / "documents.npy", table_D4[np.lexsort((starts_D, sequences_D))])
    tokens = int(lengths_D.sum())
    return {
        "sequences": num_sequences,
        "documents": len(numbers_D),
        "tokens": tokens,
        "targets": int(mask_ST.sum(dtype=np.int64)),
        "efficiency": tokens / (num_sequences * sequence_tokens),
    }


class PackedSequences:
    """A folder of packed sequences, mapped into memory.

    Args:
        folder: folder that `write_packed` has written.
    """

    def __init__(self, folder: Path) -> None:
        self._ids_ST = np.load(folder / "input_ids.npy", mmap_mode="r")
        self._mask_ST = np.load(folder / "loss_mask.npy", mmap_mode="r")
        self._table_D4 = np.load(folder / "documents.npy", mmap_mode="r")
        self._first = np.searchsorted(self._table_D4[:, 1], np.arange(len(self) + 1))

    def __len__(self) -> int:
        return len(self._ids_ST)

    def batch(self, rows: Sequence[int]) -> PackedBatch:
        """Return some sequences as one batch.

        Args:
            rows: numbers of the sequences; `NOTHING` gives a row of padding.
        """
        shape = (len(rows), self._ids_ST.shape[1])
        ids_BT, mask_BT = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        documents_BT = np.full(shape, -1, np.int64)
        for i, row in enumerate(rows):
            if row == NOTHING:
                continue
            ids_BT[i], mask_BT[i] = self._ids_ST[row], self._mask_ST[row]
            for number, _, start, length in self._table_D4[self._first[row] : self._first[row + 1]].tolist():
                documents_BT[i, start : start + length] = number
        document_ids_BT = torch.from_numpy(documents_BT)
        return {
            "input_ids": torch.from_numpy(ids_BT),
            "position_ids": restarting_positions(document_ids_BT),
            "document_ids": document_ids_BT,
            "loss_mask": torch.from_numpy(mask_BT),
        }
