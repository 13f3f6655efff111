"""`documents.json`: each key that is missing, unknown or of another type is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from lit_puzzle.data.document_record import read_record

SHARD = {"documents": 2, "tokens": 9, "targets": 4, "longest": 5, "sha256": "ab"}
RECORD: dict[str, Any] = {
    "fingerprint": "ab",
    "tokenizer": "cd",
    "vocab_size": 128,
    "context_tokens": 64,
    "documents": 2,
    "tokens": 9,
    "targets": 4,
    "efforts": {"low": 2},
    "shards": [SHARD],
    "settings": {},
}


def written(folder: Path, record: object) -> Path:
    """Write a record; return its file."""
    (folder / "documents.json").write_text(json.dumps(record))
    return folder / "documents.json"


def test_records_are_read(tmp_path: Path) -> None:
    assert read_record(written(tmp_path, RECORD)) == RECORD
    old = RECORD | {"shards": [{key: value for key, value in SHARD.items() if key != "sha256"}]}
    del old["settings"]
    assert read_record(written(tmp_path, old)) == old


@pytest.mark.parametrize("key", [key for key in RECORD if key != "settings"])
def test_missing_keys_are_named(key: str, tmp_path: Path) -> None:
    record = {name: value for name, value in RECORD.items() if name != key}
    with pytest.raises(ValueError, match=rf"documents\.json: missing key\(s\) \['{key}'\]"):
        read_record(written(tmp_path, record))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "many"}, r"documents\.json: vocab_size must be a whole number of at least 1, got 'many'"),
        ({"context_tokens": 0}, "context_tokens must be"),
        ({"fingerprint": None}, "fingerprint must be a text"),
        ({"efforts": []}, "efforts must be an object"),
        ({"efforts": {"low": "2"}}, "efforts: low must be a whole number"),
        ({"shards": {}}, "shards a list"),
        ({"shards": [7]}, r"shards\[0\]: expected a JSON object"),
        ({"shards": [SHARD | {"longest": -1}]}, r"shards\[0\]: longest must be"),
        ({"shards": [SHARD | {"sha256": 7}]}, r"shards\[0\]: sha256 must be a text"),
        ({"shards": [SHARD, SHARD]}, "documents is 2, the shards have 4"),
        ({"shrads": []}, r"unknown key\(s\) \['shrads'\]"),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_record(written(tmp_path, RECORD | change))
