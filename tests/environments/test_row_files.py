"""row_files.py: formats of prompts by their content; what cannot be read is refused by name."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lit_puzzle.data.prompts import read_prompts
from lit_puzzle.environments.row_files import read_rows

ROWS = [{"prompt": "naïve?"}, {"prompt": "second?"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_all(folder: Path) -> list[str]:
    """The same rows in every form that is read."""
    (folder / "plain.jsonl").write_text(LINES, encoding="utf-8")
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (folder / "mark.jsonl").write_text(LINES, encoding="utf-8-sig")
    (folder / "sixteen.jsonl").write_text(LINES, encoding="utf-16")
    write_parquet(folder / "LOUD.PARQUET", ROWS)
    write_parquet(folder / "no_suffix", ROWS)
    (folder / "shards").mkdir()
    write_parquet(folder / "shards" / "train-00000-of-00002.parquet", ROWS[:1])
    write_parquet(folder / "shards" / "train-00001-of-00002.parquet", ROWS[1:])
    (folder / "shards" / "README.md").write_text("about")
    return [path.name for path in folder.iterdir()]


def test_every_form_gives_the_same_rows(tmp_path: Path) -> None:
    names = write_all(tmp_path)
    assert len(names) == 7
    for name in names:
        assert [row for _, row in read_rows(tmp_path / name)] == ROWS, name
    places = [place for place, _ in read_rows(tmp_path / "shards")]
    assert places == [f"{tmp_path}/shards/train-0000{number}-of-00002.parquet:1" for number in range(2)]
    assert {problem.environment for problem in read_prompts(tmp_path / "packed.jsonl.gz")} == {"packed"}


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_text(LINES, encoding="latin-1")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 cut")
    os.mkfifo(tmp_path / "pipe")
    for name in ("empty", "mixed", "splits", "torn"):
        (tmp_path / name).mkdir()
    write_parquet(tmp_path / "mixed" / "a.parquet", ROWS)
    (tmp_path / "mixed" / "b.jsonl").write_text(LINES)
    write_parquet(tmp_path / "splits" / "train-0.parquet", ROWS)
    write_parquet(tmp_path / "splits" / "test-0.parquet", ROWS)
    (tmp_path / "torn" / "dataset_info.json").write_text("{")
    (tmp_path / "torn" / "state.json").write_text("{")
    cases = {
        "latin.jsonl": r"latin\.jsonl:1 is not UTF-8",
        "cut.parquet": r"cut\.parquet cannot be read as Parquet",
        "pipe": "a device or a pipe",
        "empty": "holds no Parquet file",
        "mixed": r"mixed holds Parquet shards and b\.jsonl",
        "splits": r"splits holds shards of several sets \(test-N\.parquet, train-N\.parquet\)",
        "torn": "torn cannot be used: ",
        "missing": "is missing",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as refused:
            list(read_rows(tmp_path / name))
        assert name in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="/dev/zero must be a regular file, but it is a device or a pipe"):
        list(read_rows(Path("/dev/zero")))


def test_null_columns_of_parquet_are_missing_keys(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "a", "thinking": None}], "prompt": None},
        {"messages": None, "prompt": "b"},
    ]
    write_parquet(tmp_path / "p.parquet", rows)
    first, second = read_prompts(tmp_path / "p.parquet")
    assert first.messages == ({"role": "user", "content": "a"},) and second.messages[0]["content"] == "b"
    assert first.source == f"{tmp_path}/p.parquet:1" and first.environment == "p"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "id": 3}, r"p\.jsonl:2: the keys \['id'\] have no use"),
        ({"prompt": "a", "reasoning_effort": "high"}, r"p\.jsonl:2: reasoning_effort is given"),
        ({"prompt": "a", "environment": 3}, r"p\.jsonl:2: environment must be a text"),
        ({"prompt": " "}, r"p\.jsonl:2: the user asks nothing: the last user message is empty"),
        ({"prompt": "a", "tools": "search"}, r"p\.jsonl:2: tools must be a list of objects"),
        ({"messages": [{"role": "human", "content": "a"}]}, r"message 1 has the role 'human'; .*Write 'user'"),
        ({"messages": [{"role": "User", "content": "a"}]}, "Write 'user'"),
        ({"messages": [{"role": "function", "content": "a"}]}, "Write 'tool'"),
        ({"messages": [{"role": "gpt", "content": "a"}]}, "Write 'assistant'"),
        ({"messages": [{"role": "system", "content": "a"}]}, "the last message is the system's"),
        ({"messages": [{"role": "user", "content": None}]}, "content must be a text"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "content must be a text"),
        ({"messages": ["a"]}, "message 1 must be an object"),
        ([1], "is not of the form"),
    ],
)
def test_rows_are_refused_by_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n' + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message) as refused:
        read_prompts(tmp_path / "p.jsonl")
    assert str(refused.value).startswith(f"{tmp_path}/p.jsonl:2") and "\n" not in str(refused.value)
