"""Reads `documents.json`, what a folder of documents says about itself; a wrong key is refused by name.

Writes nothing.
"""

from pathlib import Path
from typing import Any

from lit_puzzle.run.files import read_json
from lit_puzzle.run.strict_json import check_whole, checked_keys

TEXTS, WHOLE = ("fingerprint", "tokenizer"), ("vocab_size", "context_tokens", "documents", "tokens", "targets")
OF_SHARD = ("documents", "tokens", "targets", "longest")
SUMMED, CHECKSUMS = ("documents", "tokens", "targets"), ("sha256", "labels_sha256")


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a `documents.json`.

    Args:
        path: the file; records without checksums of the shards or `settings` are read, too.

    Raises:
        ValueError: a key is missing, unknown or of another type, or the counts of the shards do not add up.
    """
    record = checked_keys(str(path), read_json(path), (*TEXTS, *WHOLE, "efforts", "shards"), ("settings",))
    for key in TEXTS:
        if not isinstance(record[key], str):
            raise ValueError(f"{path}: {key} must be a text, got {record[key]!r}")
    for key in WHOLE:
        check_whole(str(path), key, record[key], 1 if key in ("vocab_size", "context_tokens") else 0)
    if not isinstance(record["efforts"], dict) or not isinstance(record["shards"], list):
        raise ValueError(f"{path}: efforts must be an object and shards a list of objects. Make the folder again.")
    for effort, count in record["efforts"].items():
        check_whole(f"{path}: efforts", effort, count, 0)
    for number, row in enumerate(record["shards"]):
        _check_shard(f"{path}: shards[{number}]", row)
    for key in SUMMED:
        total = sum(row[key] for row in record["shards"])
        if total != record[key]:
            raise ValueError(f"{path}: {key} is {record[key]}, the shards have {total}. Make the folder again.")
    return record


def _check_shard(owner: str, row: object) -> None:
    counts = checked_keys(owner, row, OF_SHARD, CHECKSUMS)
    for key in OF_SHARD:
        check_whole(owner, key, counts[key], 0)
    for key in CHECKSUMS:
        if not isinstance(counts.get(key, ""), str):
            raise ValueError(f"{owner}: {key} must be a text, got {counts[key]!r}")
