"""json_lines.py: encodings and compression that are read; devices, bombs and broken text that are refused by name."""

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from lit_puzzle.run import json_lines
from lit_puzzle.run.json_lines import read_json_lines

ROWS = [{"text": "naïve ☃ 𝄞"}, {"text": "second\u2028line"}]
TEXT = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),  # a byte order mark
        TEXT[1:].encode(),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        gzip.compress(TEXT.encode(), mtime=0),
        gzip.compress(TEXT.encode("utf-16-le"), mtime=0),
        TEXT[1:].replace("\n", "\r\n").encode(),
    ],
)
def test_encodings_that_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert [row for _, row in read_json_lines(tmp_path / "rows.jsonl")] == ROWS


def test_places_are_lines_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('\n{"a": 1}\n\n[2]')
    places = [(place.removeprefix(f"{tmp_path}/"), row) for place, row in read_json_lines(tmp_path / "rows.jsonl")]
    assert places == [("rows.jsonl:2", {"a": 1}), ("rows.jsonl:4", [2])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": "é"}'.encode("latin-1"), r"rows\.jsonl:2 is not UTF-8: character 7 is the byte 0xe9"),
        (TEXT[1:].encode("utf-16-le"), "UTF-16 without a byte order mark"),
        (TEXT.encode("utf-16-le")[:-1], "not UTF-16: truncated data"),
        (TEXT.encode("utf-32"), "UTF-32"),
        (gzip.compress(TEXT[1:].encode() * 100, mtime=0)[:-9], r"rows\.jsonl cannot be read"),
        (b"\x1f\x8b\x08 no gzip", r"rows\.jsonl cannot be read"),
        (b"BZh91AY", "bzip2"),
        (b"\x28\xb5\x2f\xfd\x00", "zstd"),
        (b"PAR1", "Parquet"),
        (b'{"a": 1}\n{"a": NaN}', r"rows\.jsonl:2"),
        (b'{"a": 1e999}', r"rows\.jsonl:1"),
        (b'{"a": 1, "a": 2}', "given twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 100_000, "nested"),
        (b"[" * 70 + b"]" * 70, "nested more than 64"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b"{", r"rows\.jsonl:1 is not JSON"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        list(read_json_lines(tmp_path / "rows.jsonl"))
    assert "rows.jsonl" in str(refused.value) and "\n" not in str(refused.value)


def test_depth_within_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("[" * 60 + "]" * 60)
    assert len(list(read_json_lines(tmp_path / "rows.jsonl"))) == 1


def test_devices_pipes_and_folders_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (Path("/dev/zero"), "a device or a pipe"),
        (tmp_path / "pipe", "a device or a pipe"),
        (tmp_path, "a folder"),
        (tmp_path / "missing", "is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_json_lines(path))


def test_long_lines_and_bombs_end_within_seconds(tmp_path: Path) -> None:
    begun = time.monotonic()
    (tmp_path / "line.jsonl").write_bytes(b'{"text": "' + b"a" * (100 << 20) + b'"}\n')
    with pytest.raises(ValueError, match=r"line\.jsonl:1 has more than 33,554,432 characters"):
        list(read_json_lines(tmp_path / "line.jsonl"))
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", compresslevel=1) as bomb:
        for _ in range(64):
            bomb.write(b" " * (1 << 20))
    with pytest.raises(ValueError, match=r"bomb\.jsonl\.gz:1 has more than"):
        list(read_json_lines(tmp_path / "bomb.jsonl.gz"))
    assert time.monotonic() - begun < 10


def test_more_lines_than_allowed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINES", 3)
    (tmp_path / "rows.jsonl").write_text("1\n2\n3\n")
    assert len(list(read_json_lines(tmp_path / "rows.jsonl"))) == 3
    (tmp_path / "rows.jsonl").write_text("1\n\n\n\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl has more than 3 lines"):
        list(read_json_lines(tmp_path / "rows.jsonl"))
