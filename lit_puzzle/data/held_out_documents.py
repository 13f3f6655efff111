"""Which documents of a folder are held out of training: one prompt in so many, by the checksum of its tokens.

Reads a folder of documents; writes nothing. Memory: the held-out documents and one shard.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

from lit_puzzle.data.document_files import DocumentFolder


def is_held_out_prompt(prompt_ids: NDArray[np.int32], one_in: int) -> bool:
    """Return whether the document of a prompt is held out; none is if `one_in` is 0."""
    return one_in > 0 and zlib.crc32(prompt_ids.tobytes()) % one_in == 0


def held_out_documents(folder: DocumentFolder, one_in: int) -> list[tuple[list[int], list[int]]]:
    """Return token ids and loss mask of the held-out documents, in order.

    Args:
        folder: the documents; those without a target do not count.
        one_in: one prompt in so many; 1: all.

    Raises:
        ValueError: there is none.
    """
    found = []
    for number in range(folder.num_shards):
        shard = folder.shard(number)
        for begin, end in zip(shard.offsets, shard.offsets[1:], strict=False):
            ids, mask = shard.ids_N[begin:end], shard.mask_N[begin:end]
            targets = np.flatnonzero(mask)
            if len(targets) and is_held_out_prompt(ids[: targets[0]], one_in):
                found.append((ids.tolist(), mask.tolist()))
    if not found:
        raise ValueError(f"{folder.folder}: none of {len(folder)} documents is held out by validation_one_in {one_in}.")
    return found
