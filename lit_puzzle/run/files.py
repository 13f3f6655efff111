"""Reads text, JSON and YAML files within limits and strictly, and writes files atomically.

A file that a user names can be anything: a device without end, a pipe, gigabytes, another encoding, JSON nested ten
thousand levels deep, YAML whose aliases expand to billions of values. Each of these is a ValueError within seconds that
names the file. JSON and YAML with a key given twice are refused, JSON with NaN or infinities too, when it is read and
when it is written. Needs no torch.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

MAX_TEXT_BYTES = 64 << 20  # the largest file that is read whole: a tokenizer.json of 200k tokens has 28 MB
MAX_YAML_BYTES = 256 << 10  # the YAML parser reads 100 KB a second
MAX_YAML_VALUES = 100_000  # with every alias expanded


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a file.

    Args:
        path: a regular file in UTF-8, with or without a byte order mark.
        max_bytes: largest size that is read.

    Raises:
        ValueError: the file is missing, no regular file, too large, unreadable or not UTF-8.
    """
    check_regular(path)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            raw = stream.read(min(size, max_bytes) + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if size > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes; at most {max_bytes:,} are read of such a file")
    if len(raw) > size:
        raise ValueError(f"{path} grew while it was read")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}; save it as UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def resolved(path: Path) -> Path:
    """Return an absolute path without links; `Path.resolve` raises a RuntimeError where links lead in a circle."""
    return Path(os.path.realpath(path))


def check_regular(path: Path) -> None:
    """Check that a path is a regular file, or a link to one: reading a device or a pipe might never end.

    Raises:
        ValueError: it is missing, something else, or in a folder that cannot be read.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{path} must be a regular file, but it is {'a folder' if stat.S_ISDIR(mode) else 'a device or a pipe'}"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        ValueError: `read_text` or `parse_json` refuses it, or it is not an object.
    """
    data = parse_json(read_text(path), str(path))
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def parse_json(text: str | bytes, where: str) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text.
        where: the file, or file and line, for messages.

    Raises:
        ValueError: it is not JSON, an object has a key twice, a number is NaN, infinite or too long, or values are
            nested too deeply.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_not_finite, parse_float=_finite, parse_int=_whole
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not JSON: it is not UTF-8 text") from error
    except RecursionError:
        raise ValueError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:  # of the functions below
        raise ValueError(f"{where}: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in content if keys.count(key) > 1)!r} is given twice")
    return content


def _not_finite(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _whole(digits: str) -> int:
    if len(digits) > 400:  # no float has more; int() itself refuses 4,300 digits
        raise ValueError(f"the number {digits[:40]}... has {len(digits):,} digits")
    return int(digits)


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file.

    Raises:
        ValueError: `read_text` or `parse_yaml` refuses it, or it has more than 256 KiB.
    """
    return parse_yaml(read_text(path, MAX_YAML_BYTES), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text, as `yaml.safe_load` does; numbers such as `.nan` stay what they are.

    Args:
        text: the text.
        where: the file, for messages.

    Raises:
        ValueError: it is not YAML, a mapping has a key twice, aliases expand to more than 100,000 values or to
            themselves, or values are nested too deeply.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{where} is not valid YAML: {place}{reason}") from error
    except RecursionError:
        raise ValueError(f"{where}: the YAML is nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # The parser raises these for a value that does not fit its tag (`!!int ""`, 2024-13-45).
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which refuses repeated keys and aliases that expand without bound."""

    def get_single_node(self) -> yaml.Node | None:
        """Return the root of the document after checking all of it."""
        root = super().get_single_node()
        if root is not None:
            self._size(root, {})
        return root

    def _size(self, node: yaml.Node, known: dict[yaml.Node, int]) -> int:
        """Return how many values a node expands to."""
        if node in known:
            if not known[node]:
                self._refuse(node, "an alias that contains itself")
            return known[node]
        known[node] = 0  # its parts are being counted
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[node] = 1 + sum(self._size(part, known) for part in parts)
        if known[node] > MAX_YAML_VALUES:
            self._refuse(node, f"aliases expand to more than {MAX_YAML_VALUES:,} values")
        return known[node]

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    self._refuse(key, f"the key {key.value!r} is given twice")
                seen.add((key.tag, key.value))

    def _refuse(self, node: yaml.Node, problem: str) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def to_json(value: Any, indent: int | None = 1, sort_keys: bool = False) -> str:
    """Return a value as JSON text, which any reader of JSON accepts.

    Args:
        value: of dicts with text keys, lists, tuples, texts, numbers, booleans and None.
        indent: blanks of one level; None: everything in one line.
        sort_keys: whether keys are sorted.

    Raises:
        ValueError: a number is NaN or infinite; the message names its keys.
    """
    for keys, number in _numbers(value, ()):
        if not math.isfinite(number):
            raise ValueError(f"{'.'.join(keys) or 'the value'} is {number}, which JSON cannot represent")
    return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)


def _numbers(value: Any, keys: tuple[str, ...]) -> Any:
    """Yield every float inside a value with the keys and positions that lead to it."""
    if isinstance(value, float):
        yield keys, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, (*keys, str(key)))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _numbers(part, (*keys, str(index)))


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write a value as a JSON file, atomically.

    Raises:
        ValueError: a number is NaN or infinite, or the file cannot be written.
    """
    try:
        text = to_json(value, indent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    write_atomically(path, text + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically, text in UTF-8: a reader sees the old content or the new, even if this process is killed.

    Raises:
        ValueError: the file cannot be written: the disk is full, or the folder is missing or read-only.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
