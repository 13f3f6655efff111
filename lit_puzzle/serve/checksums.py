"""SHA-256 of every file of a folder, in the format that `sha256sum -c SHA256SUMS` and `lit_puzzle.run.checksums` read.

One background thread hashes each finished file while the next is written, when it is still in the page cache. Writes
SHA256SUMS. Memory: a buffer. Traffic: each file is read once more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from lit_puzzle.run.checksums import CHECKSUMS


class Checksums:
    """Hashes of finished files, computed in a background thread."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._digests: dict[Path, Future[str]] = {}

    def add(self, path: Path) -> None:
        """Start to hash a finished file."""
        self._digests[path] = self._pool.submit(_digest, path)

    def write(self, folder: Path) -> None:
        """Write the list of all files of a folder; files that were not added before are hashed now."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
        for path in files:
            if path not in self._digests:
                self.add(path)
        lines = [f"{self._digests[path].result()}  {path.relative_to(folder).as_posix()}\n" for path in files]
        (folder / CHECKSUMS).write_text("".join(lines))


@contextmanager
def checksums() -> Iterator[Checksums]:
    """Provide checksums whose thread ends with the context."""
    with ThreadPoolExecutor(1) as pool:
        yield Checksums(pool)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
