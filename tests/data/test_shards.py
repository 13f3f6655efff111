"""shards.py: what other tools may write into a shard, and what is refused by the number of the document."""

from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lit_puzzle.data.shards import SCHEMA, read_shard

GOOD: dict[str, Any] = {
    "input_ids": [[1, 2, 3], [4, 5]],
    "loss_mask": [[0, 1, 1], [0, 1]],
    "environment": ["a", "a"],
    "effort": ["low", "high"],
    "correct": [1.0, None],
}


def write(path: Path, kinds: dict[str, Any] | None = None, **columns: Any) -> Path:
    """Write a shard as another tool would, with types and values of its own."""
    types = {name: SCHEMA.field(name).type for name in SCHEMA.names} | (kinds or {})
    arrays = {name: pyarrow.array(values, types[name]) for name, values in (GOOD | columns).items()}
    parquet.write_table(pyarrow.table(arrays), path / "shard.parquet")
    return path / "shard.parquet"


@pytest.mark.parametrize("kind", [pyarrow.list_(pyarrow.int64()), pyarrow.large_list(pyarrow.uint16())])
def test_other_types_of_whole_numbers_are_read(tmp_path: Path, kind: Any) -> None:
    shard = read_shard(write(tmp_path, {"input_ids": kind, "correct": pyarrow.int8()}, correct=[1, None]), 10, 10)
    assert shard.ids_N.tolist() == [1, 2, 3, 4, 5] and shard.mask_N.tolist() == [0, 1, 1, 0, 1]
    assert shard.correct == [1.0, None] and shard.offsets.tolist() == [0, 3, 5]


@pytest.mark.parametrize(
    ("kinds", "columns", "message"),
    [
        ({}, {"input_ids": [[1, 2, 3], [4, None]]}, r"shard\.parquet: document 1 holds null in input_ids"),
        ({}, {"input_ids": [[None, 2, 3], [4, 5]]}, "document 0 holds null in input_ids"),
        ({}, {"loss_mask": [[0, 1, 1], [0, None]]}, "document 1 holds null in loss_mask"),
        ({}, {"input_ids": [[1, 2, 3], None]}, r"document 1 has no input_ids \(null\)"),
        (
            {"input_ids": pyarrow.list_(pyarrow.int64())},
            {"input_ids": [[1, 2, 3], [4, 2**32 + 1]]},
            "1 holds 4294967297",
        ),
        ({"input_ids": pyarrow.list_(pyarrow.uint64())}, {"input_ids": [[2**63, 2, 3], [4, 5]]}, "0 holds 92233720368"),
        ({"input_ids": pyarrow.list_(pyarrow.float64())}, {}, r"input_ids has the type list<.*double>"),
        ({"input_ids": pyarrow.string()}, {"input_ids": ["1", "2"]}, "input_ids has the type string"),
        ({}, {"effort": ["low", None]}, r"document 1 has no effort \(null\)"),
        ({}, {"effort": ["low", "extreme"]}, "document 1 has the effort 'extreme'"),
        ({"effort": pyarrow.int64()}, {"effort": [0, 1]}, "effort has the type int64; string is needed"),
        ({"correct": pyarrow.string()}, {"correct": ["yes", "no"]}, "correct has the type string; double is needed"),
    ],
)
def test_what_means_no_token_is_refused_by_document(
    tmp_path: Path, kinds: dict[str, Any], columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read_shard(write(tmp_path, kinds, **columns), 10, 10)
    assert "\n" not in str(refused.value)
