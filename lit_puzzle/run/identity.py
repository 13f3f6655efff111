"""Identity of a file, a folder or texts: a hash of each part of the content, wherever it lies.

Reads what it identifies; writes nothing. Needs no torch: identities of checkpoints are made by
`lit_puzzle.model.identity`. Memory: a buffer. Traffic: files below 64 MiB are read whole, of larger ones 256 pages of
4 KiB; a folder counts as one file, with at least 16 pages of each of its files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_puzzle.run.folder import CONFIG, INPUTS_FILE, OUTPUTS_FILE, RECORD

WHOLE_BYTES = 1 << 26
PAGE_BYTES = 4096
PAGES = 256
BOOKKEEPING = frozenset({INPUTS_FILE, OUTPUTS_FILE, RECORD, CONFIG})  # of a run: no content of a folder


@dataclass(frozen=True)
class Identity:
    """What an input or output is.

    Attributes:
        path: where it was found.
        content: part -> hash, for example of `weights` and `tokenizer`; two inputs are the same if all parts are.
    """

    path: str
    content: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"path": self.path, "content": dict(self.content)}


def text_hash(*texts: str) -> str:
    """Return a hash of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def file_identity(path: Path, names: Iterable[str] | None = None) -> Identity:
    """Return the identity of a file or a folder, see `files_hash`.

    Args:
        path: a file or a folder.
        names: files of the folder; None: all but hidden ones and the bookkeeping of a run.

    Raises:
        ValueError: it does not exist or cannot be read.
    """
    return Identity(str(path), {"files": files_hash(path, names)})


def files_hash(path: Path, names: Iterable[str] | None = None) -> str:
    """Return a hash of a file, or of names and contents of files in a folder.

    Args:
        path: a file or a folder.
        names: files of the folder; None: all but hidden ones and the bookkeeping of a run.

    Raises:
        ValueError: it does not exist or cannot be read.
    """
    if path.is_dir():
        files = {name: path / name for name in names} if names is not None else _files(path)
    else:
        files = {"": path}
    digest = hashlib.sha256()
    try:
        sizes = {name: file.stat().st_size for name, file in files.items()}
        whole = sum(sizes.values()) <= WHOLE_BYTES
        for name in sorted(files):
            digest.update(json.dumps([name, sizes[name]]).encode())
            _add_content(digest, files[name], sizes[name], whole, max(16, PAGES // len(files)))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}. Restore it, or name another input.") from error
    return digest.hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        path.as_posix(): folder / path
        for path in found
        if not any(part.startswith(".") for part in path.parts) and path.parts[0] not in BOOKKEEPING
    }


def _add_content(digest: hashlib._Hash, file: Path, size: int, whole: bool, pages: int) -> None:
    with file.open("rb") as stream:
        if whole or size <= PAGE_BYTES * pages:
            while block := stream.read(1 << 20):
                digest.update(block)
            return
        for page in range(pages):
            stream.seek((size - PAGE_BYTES) * page // (pages - 1))
            digest.update(stream.read(PAGE_BYTES))
