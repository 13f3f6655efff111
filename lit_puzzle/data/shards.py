"""Reads one shard of documents: a Parquet file, whose columns and values are checked; each error names the document.

The file may come from any tool: other types of whole numbers are taken if their values fit, nulls are refused.

Memory: 5 bytes a token, 9 while its Parquet is decoded. Writes nothing.
Shapes: D documents of a shard, N their tokens laid end to end.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet

from lit_puzzle.data.packing_settings import DocumentFilter
from lit_puzzle.environments.environment import LEVELS

SCHEMA = pyarrow.schema(
    {
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "loss_mask": pyarrow.list_(pyarrow.uint8()),
        "environment": pyarrow.string(),
        "effort": pyarrow.string(),
        "correct": pyarrow.float64(),
    }
)


class Shard(NamedTuple):
    """The documents of one shard: document d is `[offsets[d]:offsets[d + 1]]` of the flat arrays."""

    ids_N: NDArray[np.int32]
    mask_N: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    environments: list[str]
    efforts: list[str]
    correct: list[float | None]

    def __len__(self) -> int:
        return len(self.efforts)


def read_shard(path: Path, vocab_size: int, context_tokens: int) -> Shard:
    """Read one shard; the first token of a document is never a target, whatever its mask says.

    Raises:
        ValueError: Another schema, an unknown effort, token ids outside the vocabulary, a mask that does not fit, or a
            document that is longer than the context; names the document.
    """
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file: {' '.join(str(error).split())}") from error
    if set(SCHEMA.names) - set(table.column_names):
        raise ValueError(f"{path} has the columns {table.column_names}; needed are {SCHEMA.names}.")
    ids, mask = (_whole_numbers(path, table[name].combine_chunks(), name) for name in ("input_ids", "loss_mask"))
    offsets, mask_offsets = (column.offsets.to_numpy().astype(np.int64) for column in (ids, mask))
    ids_N, mask_N = (column.values.to_numpy(zero_copy_only=False) for column in (ids, mask))
    columns = [_column(path, table[name], name) for name in SCHEMA.names[2:]]
    _check_efforts(path, columns[1])
    shard = Shard(ids_N, mask_N.copy(), offsets, *columns)
    if not np.array_equal(offsets, mask_offsets):
        raise ValueError(f"{path}: document {_first(offsets != mask_offsets) - 1} has a loss_mask of another length.")
    _check_tokens(path, shard, vocab_size, context_tokens)
    shard.mask_N[offsets[:-1][np.diff(offsets) > 0]] = 0
    return shard


def passing(filter: DocumentFilter, shard: Shard) -> NDArray[np.bool_]:
    """Return for each document of a shard whether it passes a filter."""
    return np.array(
        [
            (filter.efforts is None or effort in filter.efforts)
            and (filter.environments is None or environment in filter.environments)
            and (not filter.only_correct or correct == 1.0)
            for environment, effort, correct in zip(shard.environments, shard.efforts, shard.correct, strict=True)
        ],
        dtype=np.bool_,
    )


def _whole_numbers(path: Path, lists: Any, name: str) -> Any:
    """Return a column of lists in the type of `SCHEMA`, without nulls.

    Raises:
        ValueError: it is of another type, or a document is null or contains null or a number that the type cannot hold.
    """
    kind = SCHEMA.field(name).type
    is_list = pyarrow.types.is_list(lists.type) or pyarrow.types.is_large_list(lists.type)
    if not is_list or not pyarrow.types.is_integer(lists.type.value_type):
        raise ValueError(f"{path}: {name} has the type {lists.type}; lists of whole numbers are needed.")
    if lists.null_count:
        raise ValueError(f"{path}: document {_first(lists.is_null().to_numpy(False))} has no {name} (null).")
    limits = np.iinfo(kind.value_type.to_pandas_dtype())
    values = lists.flatten()
    numbers_N = values.fill_null(0).to_numpy()
    null_N = values.is_null().to_numpy(zero_copy_only=False)
    wrong_N = null_N | (numbers_N < int(limits.min)) | (numbers_N > int(limits.max))
    if np.any(wrong_N):
        place = _first(wrong_N)
        document = int(np.searchsorted(np.asarray(lists.offsets), place + lists.offsets[0].as_py(), side="right")) - 1
        held = values[place].as_py()
        raise ValueError(
            f"{path}: document {document} holds {'null' if held is None else held} in {name}; allowed are "
            f"{limits.min}..{limits.max}."
        )
    return lists.cast(kind)


def _column(path: Path, column: Any, name: str) -> list[Any]:
    """Return a column as Python values; only `correct` may be null."""
    kind = SCHEMA.field(name).type
    is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    if pyarrow.types.is_string(kind) and not (is_text or pyarrow.types.is_dictionary(column.type)):
        raise ValueError(f"{path}: {name} has the type {column.type}; {kind} is needed.")
    try:
        values: list[Any] = column.cast(kind).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: {name} has the type {column.type}; {kind} is needed.") from error
    if name != "correct" and column.null_count:
        raise ValueError(f"{path}: document {values.index(None)} has no {name} (null).")
    return values


def _check_efforts(path: Path, efforts: list[str]) -> None:
    for document, effort in enumerate(efforts):
        if effort not in LEVELS:
            raise ValueError(f"{path}: document {document} has the effort {effort!r}; efforts are {list(LEVELS)}.")


def _check_tokens(path: Path, shard: Shard, vocab_size: int, context_tokens: int) -> None:
    lengths_D = np.diff(shard.offsets)
    if np.any(lengths_D > context_tokens):
        document = _first(lengths_D > context_tokens)
        raise ValueError(
            f"{path}: document {document} has {lengths_D[document]} tokens; the context of the parent that wrote it "
            f"holds {context_tokens}."
        )
    outside_N = (shard.ids_N < 0) | (shard.ids_N >= vocab_size)
    for wrong_N, values_N, allowed in (
        (outside_N, shard.ids_N, f"token ids 0..{vocab_size - 1}"),
        (shard.mask_N > 1, shard.mask_N, "loss_mask values 0 and 1"),
    ):
        if np.any(wrong_N):
            token = _first(wrong_N)
            document = int(np.searchsorted(shard.offsets, token, side="right")) - 1
            raise ValueError(f"{path}: document {document} holds {values_N[token]}; allowed are {allowed}.")


def _first(wrong: NDArray[np.bool_]) -> int:
    return int(np.argmax(wrong))
