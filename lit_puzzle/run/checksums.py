"""Compares files of a folder with its SHA256SUMS, in the format of `sha256sum`; an export has one.

Only files that a stage reads are compared: a README may be edited. A file that was found intact is not read again by
the process while its size and time of change stay the same. Reads SHA256SUMS and the files; writes nothing. Needs no
torch.

Cost: SHA-256 takes 1.8 GB/s of a core, and `check_files` uses up to four cores.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lit_puzzle.run.files import check_regular, read_text

CHECKSUMS = "SHA256SUMS"
READ_SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model"})
THREADS = 4
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")

_intact: set[tuple[Path, int, int, str]] = set()  # file, size, time of change, its checksum


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the checksums of a folder's files that stages read, by name; none if it has no SHA256SUMS.

    Raises:
        ValueError: SHA256SUMS is damaged, a file that it lists is missing, or it lists not all weights.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    sums: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        matched = LINE.fullmatch(line)
        if matched is None or matched[2] in sums or Path(matched[2]).is_absolute() or ".." in Path(matched[2]).parts:
            raise ValueError(f"{path}, line {number}: expected a checksum and a name in this folder, got {line[:80]!r}")
        if Path(matched[2]).suffix in READ_SUFFIXES:
            sums[matched[2]] = matched[1]
    unlisted = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in sums)
    if unlisted:
        raise ValueError(
            f"{path} does not list {', '.join(unlisted[:3])}: it was cut, or the weights are not its own; copy or "
            f"download the folder again, or remove {CHECKSUMS} if you changed the folder on purpose"
        )
    for name in sums:
        if not (folder / name).exists():
            raise ValueError(f"{folder / name} is missing, but {path} lists it; copy or download the folder again")
    return sums


def check_files(folder: Path, sums: dict[str, str], names: Collection[str]) -> None:
    """Compare files with their checksums.

    Args:
        folder: folder of the files.
        sums: its checksums.
        names: files to compare; one without a checksum is passed over.

    Raises:
        ValueError: the content of a file is another one.
    """
    listed = [name for name in names if name in sums]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: _check(folder / name, sums[name]), listed))


def _check(path: Path, expected: str) -> None:
    check_regular(path)
    state = path.stat()
    key = (path.resolve(), state.st_size, state.st_mtime_ns, expected)
    if key in _intact:
        return
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} is not the file of {path.parent / CHECKSUMS}: its SHA-256 is {found[:12]}..., expected "
            f"{expected[:12]}...; copy or download it again, or remove {CHECKSUMS} if you changed the file on purpose"
        )
    _intact.add(key)
