"""Hidden states between two layers, of all tokens of a pass, in memory-mapped files that survive an interruption.

Writes and reads, in one folder, `record.json` (number of tokens, channels, dtype and a hash of the batches) and for
each state `NAME.LAYER`: tokens x channels numbers, the states that enter layer LAYER, beside `NAME.LAYER.hash`. A file
has its name only when all its numbers are written and synced; one of another size, or without a hash, counts as none.
When the folder is opened, files of other batches are removed, and files whose content is not that of their hash. Of a
file of more than 64 MiB the hash covers 256 pages (`lit_puzzle.run.identity.files_hash`): another file is noticed, a
changed number between the pages is not.

Disk: tokens x channels x bytes per number for each file. Memory: none; the page cache holds what fits. Traffic of a
hash: at most 64 MiB when a file is written, and when it is opened again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lit_puzzle.run.files import read_json, write_json
from lit_puzzle.run.identity import files_hash

RECORD_FILE = "record.json"
PARTIAL, HASH = ".partial", ".hash"


class StateFiles:
    """The hidden states of one pass.

    Args:
        folder: its folder, made if it does not exist.
        tokens: rows of every file.
        channels: columns.
        dtype: of the numbers.
        batches_hash: identity of the batches, see `hash_of`.
    """

    def __init__(self, folder: Path, tokens: int, channels: int, dtype: torch.dtype, batches_hash: str) -> None:
        self.folder, self.tokens, self.channels, self.dtype = folder, tokens, channels, dtype
        record = {"tokens": tokens, "channels": channels, "dtype": str(dtype), "batches": batches_hash}
        if (folder / RECORD_FILE).is_file() and read_json(folder / RECORD_FILE) == record:
            self._remove_others()
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / RECORD_FILE, record)

    def layer_of(self, name: str) -> int | None:
        """Return the last layer whose entering states are complete; None if there are none."""
        return max(self.layers(name), default=None)

    def has(self, name: str, layer: int) -> bool:
        """Return whether the states that enter a layer are complete."""
        return layer in self.layers(name)

    def layers(self, name: str) -> list[int]:
        """Return the layers whose entering states are complete, ascending."""
        return sorted(int(path.suffix[1:]) for path in self._files(name))

    def read(self, name: str, layer: int) -> Tensor:
        """Return the states that enter a layer, (tokens, channels), mapped: they must not be written to."""
        return self._mapped(self.folder / f"{name}.{layer}")

    @contextmanager
    def write(self, name: str, layer: int) -> Iterator[Tensor]:
        """Yield the states that enter a layer, to be filled; they are kept when the block succeeds.

        Raises:
            ValueError: the disk has no room for them.
        """
        path = self.folder / f"{name}.{layer}"
        partial = path.with_name(path.name + PARTIAL)
        partial.unlink(missing_ok=True)
        self._reserve(partial)
        yield self._mapped(partial)
        descriptor = os.open(partial, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _hash_of_file(path).write_text(files_hash(partial))
        partial.rename(path)

    def remove(self, name: str, but: Collection[int] = ()) -> None:
        """Remove the states of a name, but those that enter certain layers."""
        for path in self._files(name):
            if int(path.suffix[1:]) not in but:
                path.unlink()
                _hash_of_file(path).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_others(self) -> None:
        """Remove states that are not those which were written, and say so; they are computed again."""
        for path in [path for path in self.folder.iterdir() if self._is_whole(path)]:
            if _hash_of_file(path).read_text() != files_hash(path):
                print(f"warning: {path} is not as it was written; its states are computed again", flush=True)
                path.unlink()
                _hash_of_file(path).unlink()

    def _is_whole(self, path: Path) -> bool:
        numbered = path.suffix[1:].isdigit() and _hash_of_file(path).is_file()  # a stage has numbered files, too
        return numbered and path.stat().st_size == self._bytes

    def _files(self, name: str) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.stem == name and self._is_whole(path)]

    @property
    def _bytes(self) -> int:
        return self.tokens * self.channels * self.dtype.itemsize

    def _reserve(self, path: Path) -> None:
        """Take the bytes of a file from the disk: a mapped file on a full disk would end the process without a word."""
        if self.tokens == 0:
            return
        with path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self._bytes)
            except OSError as error:
                path.unlink()
                raise ValueError(
                    f"{path} needs {self._bytes / 2**30:.2f} GiB of hidden states: {error.strerror}. Free disk, or "
                    "give fewer tokens; the same command resumes."
                ) from error

    def _mapped(self, path: Path) -> Tensor:
        if self.tokens == 0:
            path.touch()
            return torch.empty(0, self.channels, dtype=self.dtype)
        flat = torch.from_file(str(path), shared=True, size=self.tokens * self.channels, dtype=self.dtype)
        return flat.view(self.tokens, self.channels)


def _hash_of_file(path: Path) -> Path:
    return path.with_name(path.name + HASH)


def hash_of(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """Return the sha256 of the names, shapes and values of batches, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            values = batch[name].cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    return digest.hexdigest()
