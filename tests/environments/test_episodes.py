"""episodes.py: rows on disk, damaged rows by line, verdicts with reasons, and graders that fail."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lit_puzzle.environments.completion import ParsedCompletion
from lit_puzzle.environments.environment import Problem
from lit_puzzle.environments.episodes import (
    Episode,
    Request,
    Texts,
    Verdict,
    append_rows,
    failures,
    problem_number,
    read_rows,
    write_rows,
)
from lit_puzzle.environments.grading import grade

EPISODE = Episode(
    environment="sums",
    effort="high",
    problem=7,
    verdict=Verdict(0.0, "wrong", analysis=True, looping=False),
    generated_tokens=12,
    finish="stop",
    seed=2**64 - 1,
    row=3,
    request=Request(9, 0.25),
    texts=Texts("What?\u2028", "<|channel|>final<|message|>\ud83d<|return|>".replace("\ud83d", "☃"), "8"),
)
FINAL = "<|channel|>final<|message|>{}<|return|>"


class Grader:
    """Returns or raises what it was made with."""

    name = "mine"

    def __init__(self, result: Any) -> None:
        self.result = result

    def problem(self, rng: random.Random) -> Problem:
        raise NotImplementedError

    def verify(self, final: str, problem_answer: str) -> float:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    episodes = [EPISODE, replace(EPISODE, request=Request(), finish="length", verdict=Verdict(1.0, "right"))]
    write_rows(tmp_path / "rows.jsonl", episodes)
    assert read_rows(tmp_path / "rows.jsonl") == episodes
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert row == {
        "environment": "sums",
        "effort": "high",
        "problem": 7,
        "prompt_tokens": 9,
        "generated_tokens": 12,
        "finish": "stop",
        "seed": 2**64 - 1,
        "row": 3,
        "seconds": 0.25,
        "analysis": True,
        "looping": False,
        "correct": 0.0,
        "reason": "wrong",
        "prompt": "What?\u2028",
        "completion": "<|channel|>final<|message|>☃<|return|>",
        "answer": "8",
    }


def test_parquet_has_a_typed_column_for_each_key(tmp_path: Path) -> None:
    verdict = Verdict(0.5, "partly right", rewards={"length": -0.25})
    episodes = [EPISODE, replace(EPISODE, request=Request(), verdict=verdict)]
    write_rows(tmp_path / "rows.parquet", episodes)
    assert read_rows(tmp_path / "rows.parquet") == episodes
    table = parquet.read_table(tmp_path / "rows.parquet")
    columns = {field.name: str(field.type).partition(" (")[0].rstrip(">") for field in table.schema}
    assert columns == {
        **{"environment": "string", "effort": "string", "problem": "int64", "seed": "uint64", "row": "uint64"},
        **{"correct": "double", "reason": "string", "finish": "string", "analysis": "bool", "looping": "bool"},
        **{"prompt_tokens": "int64", "generated_tokens": "int64", "seconds": "double"},
        **{"rewards": "map<string, double", "prompt": "string", "completion": "string", "answer": "string"},
    }
    assert table["seed"].to_pylist() == [2**64 - 1] * 2 and table["prompt_tokens"].to_pylist() == [9, None]
    write_rows(tmp_path / "rows.parquet", [EPISODE], texts=False)
    assert set(parquet.read_schema(tmp_path / "rows.parquet").names) == {*columns} - {
        *("rewards", "prompt", "completion", "answer")
    }
    write_rows(tmp_path / "rows.parquet", [])
    assert read_rows(tmp_path / "rows.parquet") == []


def test_parquet_takes_lone_surrogates_and_rows_with_and_without_texts(tmp_path: Path) -> None:
    given = [replace(EPISODE, texts=Texts("What?", "\ud800!", "8")), replace(EPISODE, texts=None)]
    write_rows(tmp_path / "rows.parquet", given)
    assert read_rows(tmp_path / "rows.parquet") == [replace(EPISODE, texts=Texts("What?", "\\ud800!", "8")), given[1]]


def test_damaged_parquet_is_named_with_its_row(tmp_path: Path) -> None:
    file = tmp_path / "episodes.parquet"
    write_rows(file, [replace(EPISODE, seed=1), replace(EPISODE, seed=1, generated_tokens=3)])
    table = parquet.read_table(file)
    for name, values, message in (
        ("finish", ["stop", "eos"], r"episodes\.parquet:2: the row is damaged: finish is 'eos'"),
        ("problem", ["7", "8"], r"episodes\.parquet:1: the row is damaged: problem is '7'"),
        ("correct", [1.0, math.nan], r"episodes\.parquet:2: the row is damaged: correct is 'nan'"),
        ("more", [1, 1], r"episodes\.parquet:1: unknown key\(s\) \['more'\]"),
    ):
        columns = {column: table[column].to_pylist() for column in table.column_names} | {name: values}
        parquet.write_table(pyarrow.table(columns), file)
        with pytest.raises(ValueError, match=message) as error:
            read_rows(file)
        assert "\n" not in str(error.value)
    file.rename(tmp_path / "episodes.jsonl")
    with pytest.raises(ValueError, match=r"only episodes\.jsonl of an older version: run the stage again"):
        read_rows(file)


def test_texts_can_be_left_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [EPISODE], texts=False)
    assert read_rows(tmp_path / "rows.jsonl") == [replace(EPISODE, texts=None)]
    assert "What" not in (tmp_path / "rows.jsonl").read_text()


def test_added_rows_follow_whole_ones(tmp_path: Path) -> None:
    append_rows(tmp_path / "rows.jsonl", [EPISODE])
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.write('{"environment": "su')  # of a killed run
    append_rows(tmp_path / "rows.jsonl", [EPISODE, EPISODE])
    assert read_rows(tmp_path / "rows.jsonl") == [EPISODE] * 3


def test_times_are_not_compared() -> None:
    assert replace(EPISODE, request=Request(9, 1.0)) == EPISODE != replace(EPISODE, row=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": 2.0}, r"rows\.jsonl:2: the row is damaged: correct is '2.0'"),
        ({"correct": None}, "correct is 'None'"),
        ({"finish": "eos"}, "finish is 'eos'"),
        ({"problem": "7"}, "problem is '7'"),
        ({"generated_tokens": -1}, "generated_tokens is '-1'"),
        ({"row": True}, "row is 'True'"),
        ({"seconds": "1"}, "seconds is '1'"),
        ({"prompt": 3}, "prompt is '3'"),
        ({"extra": 3}, r"rows\.jsonl:2: unknown key\(s\) \['extra'\]"),
    ],
)
def test_damaged_rows_are_refused_by_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    lines = [json.dumps(EPISODE.to_row() | part) for part in ({}, change)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "rows.jsonl")


def test_cut_and_old_files_are_refused_by_line(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [EPISODE, EPISODE])
    text = (tmp_path / "rows.jsonl").read_text()
    for content, message in (
        (text[:-20], r"rows\.jsonl:2 is not JSON"),
        ('{"environment": "a", "finished": true}\n', r"rows\.jsonl:1: unknown key\(s\) \['finished'\]"),
        (json.dumps(EPISODE.to_row() | {"seconds": math.nan}), r"rows\.jsonl:1: NaN"),
        (text.replace(', "answer": "8"', "", 1), "it has .*'prompt', 'completion'.* only"),
        ("[]", r"rows\.jsonl:1: expected a JSON object"),
    ):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / "rows.jsonl")


SEVEN = ParsedCompletion("7", None, "final")


@pytest.mark.parametrize(
    ("result", "parsed", "finish", "verdict"),
    [
        (1.0, SEVEN, "stop", Verdict(1.0, "right")),
        (True, SEVEN, "length", Verdict(1.0, "right")),
        (0.5, SEVEN, "stop", Verdict(0.5, "partly right")),
        (0.0, SEVEN, "stop", Verdict(0.0, "wrong")),
        (1.0, ParsedCompletion(None, "7", "no_final"), "stop", Verdict(0.0, "no final answer")),
        (1.0, ParsedCompletion(None, None, "tool_call"), "stop", Verdict(0.0, "tool call")),
        (1.0, ParsedCompletion(None, None, "malformed"), "stop", Verdict(0.0, "malformed")),
        (1.0, ParsedCompletion(None, None, "unfinished"), "stop", Verdict(0.0, "unfinished")),
        (1.0, ParsedCompletion(None, None, "unfinished"), "length", Verdict(0.0, "cut off")),
        (ValueError("no\nnumber"), SEVEN, "stop", Verdict(0.0, "grader failed: ValueError: no number")),
        (OverflowError("big"), SEVEN, "length", Verdict(0.0, "grader failed: OverflowError: big")),
        (RecursionError("deep"), SEVEN, "stop", Verdict(0.0, "grader failed: RecursionError: deep")),
    ],
)
def test_verdicts_say_why(result: Any, parsed: ParsedCompletion, finish: Any, verdict: Verdict) -> None:
    assert grade(Grader(result), parsed, "8", finish) == verdict
    episode = replace(EPISODE, verdict=verdict)
    assert failures([episode, EPISODE]) == isinstance(result, Exception)


@pytest.mark.parametrize("result", [None, math.nan, math.inf, -1.0, 2.0, "1"])
def test_what_is_no_grade_stops_the_run(result: Any) -> None:
    with pytest.raises(ValueError, match=f"Environment 'mine': verify returned {result!r}; a number from 0 to 1"):
        grade(Grader(result), SEVEN, "8")


def test_problems_are_told_apart_by_all_messages() -> None:
    plain = Problem("a", ({"role": "user", "content": "q"},), "")
    system = Problem("a", ({"role": "system", "content": "s"}, *plain.messages), "")
    thinking = Problem("a", ({"role": "user", "content": "q", "thinking": "t"},), "")
    assert len({problem_number(each) for each in (plain, system, thinking)}) == 3
