import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_puzzle.run.files import (
    parse_json,
    parse_yaml,
    read_json,
    read_text,
    read_yaml,
    to_json,
    write_atomically,
    write_json,
)


def test_text_is_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for prefix in (b"", b"\xef\xbb\xbf"):
        file.write_bytes(prefix + "é\r\nb\rc".encode())
        assert read_text(file) == "é\nb\nc"


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def loop(path: Path) -> None:
    path.symlink_to(path)


def utf16(path: Path) -> None:
    path.write_text("{}", encoding="utf-16")


def latin1(path: Path) -> None:
    path.write_bytes('{"é": 1}'.encode("latin-1"))


def endless(path: Path) -> None:
    path.symlink_to("/proc/self/status")  # a regular file that says that it is empty


def large(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(65 << 20)


@pytest.mark.parametrize("read", [read_text, read_json, read_yaml])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (folder, "must be a regular file, but it is a folder"),
        (pipe, "must be a regular file, but it is a device or a pipe"),
        (device, "must be a regular file, but it is a device or a pipe"),
        (dangling, "is missing"),
        (loop, "cannot be read: Too many levels of symbolic links"),
        (utf16, "is not UTF-8 text: byte 0 is 0xff"),
        (latin1, "is not UTF-8 text: byte 2 is 0xe9"),
        (endless, "grew while it was read"),
        (large, "has 68,157,440 bytes; at most"),
    ],
)
def test_what_is_no_small_text_file_is_refused_by_name(
    tmp_path: Path, read: Callable[[Path], object], make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "broken")
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"broken .*{message}|broken is.*{message}"):
        read(tmp_path / "broken")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' is given twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "has 5,000 digits"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_json_that_is_not_strict_is_refused_by_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        read_json(tmp_path / "a.json")


def test_json_of_bytes_that_are_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="header is not JSON: it is not UTF-8 text"):
        parse_json(b'{"\xff": 1}', "header")


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4, column 3: the key 'c' is given twice"),
        (BOMB, "aliases expand to more than 100,000 values"),
        ("a: &a [*a]\n", "an alias that contains itself"),
        ("a: [1, 2\n", "is not valid YAML"),
        ("a: !!python/object:os.system x\n", "could not determine a constructor"),
        ("a: 2024-13-45\n", "is not valid YAML: month must be in 1..12"),
        ("a: !!int ''\n", "is not valid YAML"),
        ("a: !!bool maybe\n", "is not valid YAML"),
        ("a: !!timestamp now\n", "is not valid YAML"),
        ("a: 1\n--- \nb: 2\n", "is not valid YAML"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: \x07", "is not valid YAML"),
        ("# " + "x" * 300_000, "bytes; at most 262,144 are read"),
    ],
)
def test_yaml_that_is_not_strict_is_refused_by_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.yaml.*{message}") as refused:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(refused.value)


def test_yaml_is_read_as_safe_load_reads_it() -> None:
    text = "base: &b {x: 1, y: [a, .nan, 1e3, 2024-01-31]}\nown: {<<: *b, x: 2}\n1: one\n'1': text\n"
    read, expected = parse_yaml(text, "a.yaml"), yaml.safe_load(text)
    assert math.isnan(read["base"]["y"].pop(1)) and math.isnan(expected["base"]["y"].pop(1))
    assert read == expected
    assert read["own"]["x"] == 2 and parse_yaml("", "a.yaml") is None


def test_json_text_is_that_of_the_standard_library() -> None:
    value: dict[str, Any] = {"b": [1, 2.5, True, None, ("x", "é")], "a": {}}
    assert to_json(value) == json.dumps(value, indent=1)
    assert to_json(value, indent=None, sort_keys=True) == json.dumps(value, sort_keys=True)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_number_that_json_lacks_is_refused_by_its_keys(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match=rf"run\.json: results\.loss\.1 is {number}"):
        write_json(tmp_path / "run.json", {"results": {"loss": [0.0, number]}})
    assert list(tmp_path.iterdir()) == []


def test_atomic_writing_keeps_the_old_text_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_atomically(target, "old")
    with pytest.raises(TypeError):
        write_atomically(target, 3)  # type: ignore[arg-type]
    assert target.read_text() == "old"


def test_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/a\.json cannot be written: No such file or directory"):
        write_atomically(tmp_path / "nowhere" / "a.json", "text")
    (tmp_path / f".a.json.{os.getpid()}").symlink_to("/dev/full")  # the file that is written first
    with pytest.raises(ValueError, match=r"a\.json cannot be written: No space left on device"):
        write_atomically(tmp_path / "a.json", "text")
    assert list(tmp_path.iterdir()) == []
