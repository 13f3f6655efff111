"""jsonl.py: problems in the project's own form, each kind of verification, and rows that cannot be read."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from helpers.sandbox_here import needs_sandbox
from pyarrow import parquet

from lit_puzzle.environments.graders import verifier
from lit_puzzle.environments.grading import BatchEnvironment
from lit_puzzle.environments.jsonl import JsonlEnvironment
from lit_puzzle.environments.sandbox import SandboxError


def jsonl(folder: Path, *rows: object) -> Path:
    """A file with one JSON object a line."""
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("verification", "answer", "right", "wrong"),
    [
        ("exact", "to be", "  to  be\n", "to be or"),
        ("numeric", "0.5", r"\boxed{\frac{1}{2}}", "0.51"),
        ("numeric", 1 / 3, "1/3", "0.33"),
        ("numeric", 10**20, "100000000000000000000", "100000000000000000001"),
        ("choice", "B", "The answer is B", "C"),
    ],
)
def test_jsonl_environment_verifies_a_final_text(
    tmp_path: Path, verification: Any, answer: str | float, right: str, wrong: str
) -> None:
    environment = JsonlEnvironment("file", jsonl(tmp_path, {"prompt": "q?", "answer": answer}), verification)
    problem = environment.problem(random.Random(0))
    assert problem.environment == "file" and problem.messages == ({"role": "user", "content": "q?"},)
    assert environment.verify(right, problem.answer) == 1.0
    assert environment.verify(wrong, problem.answer) == 0.0


def test_jsonl_environment_takes_messages(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    environment = JsonlEnvironment("file", jsonl(tmp_path, {"messages": messages, "answer": "x"}))
    assert environment.problem(random.Random(0)).text() == "system: s\nuser: q"


@pytest.mark.parametrize(
    ("row", "verification", "message"),
    [
        ({"prompt": "q"}, "exact", "problems.jsonl:2"),
        ({"answer": "a"}, "exact", "problems.jsonl:2"),
        ([1], "exact", "problems.jsonl:2"),
        ({"messages": [{"role": "user"}], "answer": "a"}, "exact", "message 1: content must be a text, got 'None'"),
        ({"messages": [], "answer": "a"}, "exact", "a list of objects with role and content"),
        ({"prompt": "q", "answer": None}, "exact", "must be a text or a number"),
        ({"prompt": "q", "answer": "many"}, "numeric", "numeric verification"),
        ({"prompt": "q", "answer": "Z"}, "choice", "choice verification"),
        ({"prompt": "q", "answer": " "}, "exact", "exact verification"),
    ],
)
def test_jsonl_environment_names_the_bad_line(tmp_path: Path, row: object, verification: Any, message: str) -> None:
    good = {"prompt": "q", "answer": {"exact": "a", "numeric": 1, "choice": "A"}[verification]}
    with pytest.raises(ValueError, match=message):
        JsonlEnvironment("file", jsonl(tmp_path, good, row), verification)


def test_jsonl_environment_without_problems_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.jsonl is missing"):
        JsonlEnvironment("file", tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="contains no problem"):
        JsonlEnvironment("file", jsonl(tmp_path))
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.jsonl:1 is not JSON"):
        JsonlEnvironment("file", tmp_path / "broken.jsonl")


INSTRUCTIONS = {
    "instruction_id_list": ["length_constraints:number_words", "keywords:existence"],
    "kwargs": [{"num_words": 5, "relation": "less than"}, {"keywords": ["rain"]}],
}
SCHEMA = {"type": "object", "required": ["name"]}
TESTS = {"inputs": ["1 2"], "outputs": ["3"]}
OPTIONS = {"letter": "B", "options": {"A": "Nucleus", "B": "Mitochondria"}}


@pytest.mark.parametrize(
    ("verification", "answer", "right", "wrong"),
    [
        ("exact", '{"name": "Tom"}', '```json\n{"name": "Tom"}\n```', "Tom"),
        ("math", r"\frac{\sqrt{3}}{2}", r"\boxed{\sqrt{3}/2}", r"\boxed{\sqrt{3}}"),
        ("math", 18, "**18**", "**19**"),
        ("choice", OPTIONS, "mitochondria", "Nucleus"),
        ("instructions", INSTRUCTIONS, "Some rain may fall", "Some rain may fall on us today"),
        ("schema", SCHEMA, '{"name": 1}', "{}"),
        pytest.param("code", TESTS, "print(3)", "print(4)", marks=needs_sandbox),
    ],
)
def test_each_kind_of_verification(tmp_path: Path, verification: Any, answer: Any, right: str, wrong: str) -> None:
    environment = JsonlEnvironment("file", jsonl(tmp_path, {"prompt": "q?", "answer": answer}), verification)
    gold = environment.problems[0].answer
    assert isinstance(environment, BatchEnvironment)
    assert [verdict.correct for verdict in environment.verify_all([right, wrong, ""], [gold] * 3)] == [1.0, 0.0, 0.0]


def test_an_unclear_answer_is_told_apart_from_a_wrong_one(tmp_path: Path) -> None:
    environment = JsonlEnvironment("file", jsonl(tmp_path, {"prompt": "q?", "answer": 7}), "numeric")
    verdicts = environment.verify_all(["5 apples and 7 pears", "8", "7"], ["7"] * 3)
    assert [verdict.reason for verdict in verdicts] == ["unclear answer", "wrong", "right"]


@pytest.mark.parametrize("gold", [r"\sqrt{2}", "10:30", r"\frac{\pi}{4}"])
def test_a_gold_answer_that_is_no_number_is_refused_with_what_to_use(tmp_path: Path, gold: str) -> None:
    with pytest.raises(ValueError, match=r"jsonl:1: numeric verification cannot read .* Use verification: math"):
        JsonlEnvironment("file", jsonl(tmp_path, {"prompt": "q", "answer": gold}), "numeric")


def test_problems_in_parquet(tmp_path: Path) -> None:
    rows = [{"prompt": "one?", "answer": "a"}, {"prompt": "two?", "answer": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "problems.parquet")
    environment = JsonlEnvironment("file", tmp_path / "problems.parquet")
    assert [problem.answer for problem in environment.problems] == ["a", "b"]


def test_code_is_refused_at_once_where_there_is_no_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise SandboxError("Programs run in a sandbox of bubblewrap, which is not installed.")

    monkeypatch.setattr(verifier, "check_sandbox", none)
    with pytest.raises(ValueError, match="not installed"):
        JsonlEnvironment("file", jsonl(tmp_path, {"prompt": "q", "answer": TESTS}), "code")


def test_an_unknown_verification_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="verification 'judge' is not known; known are exact, numeric"):
        JsonlEnvironment("file", jsonl(tmp_path, {"prompt": "q", "answer": "a"}), "judge")  # type: ignore[arg-type]
