"""Sequences of token ids of any lengths in two mapped files, so that all processes of a machine read the same pages.

Writes and reads a folder with `ids.bin`, the token ids of all sequences end to end (int32, little-endian), and
`rows.npy` (R, 3) int64: first token, length and prompt tokens of every sequence, the longest first.

Memory: while writing, one sequence and 24 bytes a sequence; while reading, one batch and the system's cache of the
files. Disk: 4 bytes a token and 24 bytes a sequence.

Shapes: R sequences, N tokens of all of them.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_puzzle.model.writer import atomic_folder

IDS_FILE, ROWS_FILE = "ids.bin", "rows.npy"
TOKEN = np.dtype("<i4")

TokenIds = NDArray[np.int32]


def write_token_rows(folder: Path, rows: Iterable[tuple[ArrayLike, int]]) -> int:
    """Write sequences; the folder appears whole or not at all, and takes the place of an older one.

    Args:
        folder: folder to make.
        rows: token ids and number of prompt tokens of each sequence.

    Returns:
        How many sequences were written.
    """
    table: list[tuple[int, int, int]] = []
    with atomic_folder(folder, replace=True) as scratch:
        with (scratch / IDS_FILE).open("wb") as stream:
            first = 0
            for ids, prompt_tokens in rows:
                row = np.asarray(ids, TOKEN)
                stream.write(row.tobytes())
                table.append((first, len(row), prompt_tokens))
                first += len(row)
        table_R3 = np.array(table, np.int64).reshape(-1, 3)
        longest_first = np.argsort(-table_R3[:, 1], kind="stable")
        np.save(scratch / ROWS_FILE, table_R3[longest_first])
    return len(table)


class TokenRows(Sequence[TokenIds]):
    """Sequences that `write_token_rows` has written, the longest first.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._table_R3 = np.load(folder / ROWS_FILE)
        size = (folder / IDS_FILE).stat().st_size // TOKEN.itemsize  # an empty file cannot be mapped
        self._ids_N: TokenIds = np.memmap(folder / IDS_FILE, TOKEN, "r") if size else np.empty(0, TOKEN)

    def __len__(self) -> int:
        return len(self._table_R3)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return len(self._ids_N)

    @property
    def prompt_lengths(self) -> list[int]:
        """Prompt tokens of each sequence; 0 where the source does not say."""
        lengths: list[int] = self._table_R3[:, 2].tolist()
        return lengths

    @overload
    def __getitem__(self, index: int) -> TokenIds: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenIds]: ...
    def __getitem__(self, index: int | slice) -> TokenIds | list[TokenIds]:
        """Return the token ids of one sequence, or of several; nothing is copied."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        first, length, _ = self._table_R3[index].tolist()
        return self._ids_N[first : first + length]

    def sha256(self) -> str:
        """Return a hash of everything: token ids, order, prompt lengths."""
        content = hashlib.sha256(np.ascontiguousarray(self._table_R3).tobytes())
        for start in range(0, len(self._ids_N), 1 << 22):
            content.update(self._ids_N[start : start + (1 << 22)].tobytes())
        return content.hexdigest()


class RowBatches(Sequence[list[TokenIds]]):
    """Batches of sequences, made when they are asked for.

    Args:
        rows: the sequences, the longest first.
        batch_size: sequences of a batch at most.
        batch_tokens: tokens of a batch at most, padding included, but at least one sequence; None: no limit.
    """

    def __init__(self, rows: TokenRows, batch_size: int, batch_tokens: int | None = None) -> None:
        self.rows = rows
        self.edges = list(_edges(rows, batch_size, batch_tokens))

    def __len__(self) -> int:
        return len(self.edges)

    @overload
    def __getitem__(self, index: int) -> list[TokenIds]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[TokenIds]]: ...
    def __getitem__(self, index: int | slice) -> list[TokenIds] | list[list[TokenIds]]:
        """Return one batch, or several."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self.rows[self.edges[index]]

    def prompt_lengths(self) -> list[list[int]]:
        """Return the prompt tokens of each sequence of each batch."""
        lengths = self.rows.prompt_lengths
        return [lengths[edge] for edge in self.edges]


def _edges(rows: TokenRows, batch_size: int, batch_tokens: int | None) -> Iterator[slice]:
    start = 0
    while start < len(rows):
        room = batch_size if batch_tokens is None else min(batch_size, max(batch_tokens // len(rows[start]), 1))
        yield slice(start, min(start + room, len(rows)))
        start += room
