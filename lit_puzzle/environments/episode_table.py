"""Rows of completions as a Parquet file: a column for each key, of one type, compressed by zstd.

Texts and rewards are columns only where rows have them; a lone surrogate, which UTF-8 has not, is written as its
escape. Reads and writes nothing itself. Needs no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow
from pyarrow import parquet

TYPES = {
    "environment": pyarrow.string(),
    "effort": pyarrow.string(),
    "problem": pyarrow.int64(),
    "seed": pyarrow.uint64(),
    "row": pyarrow.uint64(),
    "correct": pyarrow.float64(),
    "reason": pyarrow.string(),
    "finish": pyarrow.string(),
    "analysis": pyarrow.bool_(),
    "looping": pyarrow.bool_(),
    "prompt_tokens": pyarrow.int64(),
    "generated_tokens": pyarrow.int64(),
    "seconds": pyarrow.float64(),
}
OPTIONAL = {
    "rewards": pyarrow.map_(pyarrow.string(), pyarrow.float64()),
    "prompt": pyarrow.string(),
    "completion": pyarrow.string(),
    "answer": pyarrow.string(),
}


def parquet_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as the content of a Parquet file."""
    found = {name: kind for name, kind in OPTIONAL.items() if any(name in row for row in rows)}
    columns = TYPES | found
    arrays = [pyarrow.array([_value(row.get(name)) for row in rows], kind) for name, kind in columns.items()]
    stream = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(arrays, names=list(columns)), stream, compression="zstd")
    return stream.getvalue().to_pybytes()


def _value(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return list(value.items()) if isinstance(value, dict) else value
