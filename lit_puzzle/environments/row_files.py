"""Reads rows of prompts and problems: JSON lines, Parquet, a folder of shards or of `datasets`, or a set of the hub.

The format is that of the content, not of the name: `.PARQUET`, `.jsonl.gz` and files without a suffix are read too. A
file that cannot be read is a ValueError that names it. Writes nothing.

Memory: a batch of rows. Rows are limited (`lit_puzzle.run.json_lines`), whatever a file of a few kilobytes unpacks to.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from lit_puzzle.run.json_lines import MAX_CHARACTERS, MAX_LINES, check_depth, first_bytes, read_json_lines
from lit_puzzle.run.library_calls import library_errors

PARQUET = b"PAR1"
JSON_LINES = re.compile(r"\.(?:jsonl|ndjson|json)(?:\.gz)?$", re.IGNORECASE)
BATCH_ROWS = 64
SAVED_BY_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json")


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place (file and line, or file and row) and the content of each row.

    Raises:
        ValueError: the path is no such file or folder, or cannot be read.
    """
    if path.is_dir():
        yield from _read_folder(path)
    elif first_bytes(path).startswith(PARQUET):
        yield from _read_parquet(path)
    else:
        yield from read_json_lines(path)


def _read_folder(path: Path) -> Iterator[tuple[str, Any]]:
    if any((path / name).is_file() for name in SAVED_BY_DATASETS):
        yield from _read_dataset(path)
        return
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    parquets = [file for file in files if first_bytes(file).startswith(PARQUET)]
    shards = parquets or [file for file in files if JSON_LINES.search(file.name)]
    form = "Give a file, a folder of Parquet or JSON lines shards, or one that datasets saved (save_to_disk)."
    if not shards:
        raise ValueError(f"{path} holds no Parquet file and no .jsonl. {form}")
    others = [file.name for file in files if file not in shards and file.suffix.lower() not in (".md", ".txt", "")]
    if others:
        kind = "Parquet" if parquets else "JSON lines"
        raise ValueError(f"{path} holds {kind} shards and {others[0]}, which would be left out. {form}")
    sets = sorted({re.sub(r"\d+", "N", shard.name) for shard in shards})
    if len(sets) > 1:
        raise ValueError(f"{path} holds shards of several sets ({', '.join(sets)}). Give a folder of one of them.")
    for shard in shards:
        yield from _read_parquet(shard) if parquets else read_json_lines(shard)


def read_hub(name: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    """Yield the place (name and row) and the content of each row of a data set of the Hugging Face hub.

    Args:
        name: `owner/name`.
        config: one of its configurations, if it has several.
        split: one of its splits.

    Raises:
        ValueError: it cannot be loaded; the message has the reason that the library gives.
    """
    from datasets import load_dataset

    with library_errors(f"The data set {name} (split {split}) of the Hugging Face hub"):
        table = load_dataset(name, config, split=split)
    for number, row in enumerate(table, 1):
        place = f"{name}/{split}:{number}"
        check_depth(row, place)
        yield place, row


def _read_dataset(path: Path) -> Iterator[tuple[str, Any]]:
    from datasets import Dataset, load_from_disk

    with library_errors(path):
        table = load_from_disk(str(path))
    if not isinstance(table, Dataset):
        raise ValueError(f"{path} holds the splits {list(table)}: name one, {path / next(iter(table))}.")
    for number in range(len(table)):
        with library_errors(path):
            row = table[number]
        place = f"{path}:{number + 1}"
        check_depth(row, place)
        yield place, row


def parquet_size(path: Path) -> tuple[int, int]:
    """Return how many rows a Parquet file states, and the bytes of its columns before compression.

    Raises:
        ValueError: it is no Parquet file.
    """
    try:
        stated = parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {_line(error)}") from error
    return stated.num_rows, sum(stated.row_group(number).total_byte_size for number in range(stated.num_row_groups))


def distinct_rows(path: Path, columns: Sequence[str]) -> int:
    """Return how many rows of a Parquet file differ in some of its columns; only these are read.

    Raises:
        ValueError: it is no Parquet file, or has no such columns.
    """
    try:
        table = parquet.read_table(path, columns=list(columns))
        return int(table.group_by(list(columns)).aggregate([]).num_rows)
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {_line(error)}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    number = characters = 0
    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows > MAX_LINES:
                raise ValueError(
                    f"{path} has {file.metadata.num_rows:,} rows; {MAX_LINES:,} are read. Divide the file."
                )
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError(f"{path} has two columns of one name: {sorted(names)[:20]}. Take one out.")
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                characters += batch.nbytes
                if characters > MAX_CHARACTERS:
                    raise ValueError(f"{path} unpacks to more than {MAX_CHARACTERS:,} bytes. Divide the file.")
                for row in batch.to_pylist():
                    number += 1
                    place = f"{path}:{number}"
                    check_depth(row, place)
                    yield place, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
