"""Reads JSON lines, a JSON object a line: plain or gzip, UTF-8 or UTF-16, line by line and within limits.

A file can be anything: a line without end, gigabytes in a kilobyte of gzip, text of another encoding. Each of these is
a ValueError within seconds that names the file, and the line where there is one. Blank lines are skipped. Needs no
torch.

Memory: one line, up to 4 bytes a character.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lit_puzzle.run.files import check_regular, parse_json

MAX_LINE_CHARACTERS = 32 << 20  # a prompt of eight million tokens
MAX_LINES = 20_000_000
MAX_CHARACTERS = 8 << 30  # of a file, decompressed
MAX_DEPTH = 64  # of objects and lists inside each other
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # UTF-8 with a mark needs no entry, `utf-8-sig` skips it
GZIP = b"\x1f\x8b"
OTHERS = {
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet, not text",
    b"ARROW1": "Arrow, not text",
}


def first_bytes(path: Path) -> bytes:
    """Return the first 8 bytes of a regular file.

    Raises:
        ValueError: it is missing, a device or a pipe, or cannot be read.
    """
    check_regular(path)
    try:
        with path.open("rb") as stream:
            return stream.read(8)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place (`FILE:LINE`) and the value of each line of a file.

    Args:
        path: a regular file: UTF-8 with or without a byte order mark, UTF-16 with one; gzip of such a text.

    Raises:
        ValueError: it is missing, no regular file, of another format or encoding, or too large; or a line is not JSON.
    """
    for number, line in _lines(path):
        if line.strip():
            place = f"{path}:{number}"
            value = parse_json(line, place)
            check_depth(value, place)
            yield place, value


def check_depth(value: Any, place: str) -> None:
    """Refuse values that are nested so deeply, or texts so broken, that other code fails on them.

    Raises:
        ValueError: objects and lists inside each other more than `MAX_DEPTH` times, or text with half a character.
    """
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{place}: values are nested more than {MAX_DEPTH} levels deep.")
        inside: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inside += [*part, *part.values()]
            elif isinstance(part, list):
                inside += part
            elif isinstance(part, str) and not part.isascii():
                _check_text(part, place)
        level = inside


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: character {error.start} of a text is {text[error.start]!r}, half of a surrogate pair."
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number (from 1) and text of each line."""
    total = 0
    with _opened(path) as text:
        for number in range(1, MAX_LINES + 2):
            line = text.readline(MAX_LINE_CHARACTERS + 1)
            total += len(line)
            if not line:
                return
            if len(line) > MAX_LINE_CHARACTERS:
                raise ValueError(f"{path}:{number} has more than {MAX_LINE_CHARACTERS:,} characters. Cut the line.")
            if number > MAX_LINES or total > MAX_CHARACTERS:
                raise ValueError(
                    f"{path} has more than {MAX_LINES:,} lines or {MAX_CHARACTERS:,} characters. Divide the file."
                )
            if not line.isascii():
                _check_utf8(line, f"{path}:{number}")
            yield number, line


def _check_utf8(line: str, place: str) -> None:
    """Raise a ValueError for bytes that were not UTF-8, which the decoder has marked as lone surrogates."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) & 0xFF
        raise ValueError(
            f"{place} is not UTF-8: character {error.start} is the byte {byte:#04x}. Convert the file, for example "
            "with iconv -f latin1 -t utf-8."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a file as text; what decompression and decoding raise inside is a ValueError that names the file."""
    head = first_bytes(path)
    try:
        with path.open("rb") as raw:
            stream: BinaryIO = gzip.GzipFile(fileobj=raw) if head.startswith(GZIP) else raw  # type: ignore[assignment]
            head = stream.read(8)
            stream.seek(0)
            encoding = _encoding(path, head)
            # Other bytes than UTF-8 become lone surrogates, so that the line they are in can be named.
            errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
            with io.TextIOWrapper(stream, encoding=encoding, errors=errors) as text:
                yield text
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} begins with the mark of UTF-16 but is not UTF-16: {error.reason}.") from error


def _encoding(path: Path, head: bytes) -> str:
    """Return the encoding of a text by its first bytes."""
    for magic, what in OTHERS.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {what}. Give JSON lines, plain or compressed by gzip.")
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise ValueError(f"{path} is UTF-32. Convert it to UTF-8.")
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    if encoding is None and b"\0" in head:
        raise ValueError(
            f"{path} has zero bytes at its beginning: it is binary, or UTF-16 without a byte order mark. Convert it to "
            "UTF-8."
        )
    return encoding or "utf-8-sig"
