"""public_set.py and layouts.py: a small file in the columns of each public set, and rows that do not have them."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from helpers.sandbox_here import needs_sandbox
from pyarrow import parquet

from lit_puzzle.environments.environment import Environment
from lit_puzzle.environments.grading import BatchEnvironment
from lit_puzzle.environments.layouts import VERIFICATIONS, Layout
from lit_puzzle.environments.public_set import PublicSet


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def responses(text: str) -> dict[str, Any]:
    return {"input": asked(text), "tools": [], "temperature": None}


CODE = {"inputs": ["1 2\n"], "outputs": ["3\n"]}
ROWS: dict[Layout, list[dict[str, Any]]] = {
    "dapo_math": [
        {
            "data_source": "math_dapo",
            "prompt": asked(f"Solve it. The last line must be of the form Answer: $Answer.\n\nWhat is {n} + {n}?"),
            "ability": "MATH",
            "reward_model": {"ground_truth": str(2 * n), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"id-{n}"},
        }
        for n in (17, 17, 20)
    ],
    "skywork_math": [
        {
            "data_source": "train-math-numinamath1.5_olympiads",
            "prompt": asked("Which half?"),
            "ability": "math",
            "reward_model": {"ground_truth": '["\\\\frac{\\\\sqrt{3}}{2}"]', "style": "rule"},
            "extra_info": {"index": 4, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": 3}},
        }
    ],
    "skywork_code": [
        {
            "data_source": "train-code-taco-medium",
            "prompt": asked("Add two numbers."),
            "ability": "code",
            "reward_model": {"ground_truth": json.dumps(CODE), "style": "rule"},
            "extra_info": {"index": 1},
        },
        {
            "data_source": "train-code-leetcode-Easy",
            "prompt": asked("Two sum."),
            "ability": "code",
            "reward_model": {
                "ground_truth": json.dumps(
                    {
                        "entry_point": "Solution().add",
                        "import_prefix": "from typing import *",
                        "test_code": "def check(candidate):\n    assert candidate(a = 1, b = 2) == 3\n",
                    }
                ),
                "style": "rule",
            },
            "extra_info": {"index": 2},
        },
    ],
    "nemotron_mcqa": [
        {
            "responses_create_params": responses("Which organelle?\nA: Nucleus\nB: Mitochondria"),
            "options": [{"A": "Nucleus"}, {"B": "Mitochondria"}],
            "expected_answer": "B",
            "grading_mode": "strict_single_letter_boxed",
            "uuid": "3c26",
        }
    ],
    "nemotron_instructions": [
        {
            "id": 23621,
            "instruction_id_list": ["keywords:start_end", "paragraphs:paragraphs"],
            "prompt": "Start and end with the same word, in two paragraphs.",
            "kwargs": [None, {}],
            "responses_create_params": responses("Start and end with the same word, in two paragraphs."),
            "agent_ref": {"type": "responses_api_agents", "name": "instruction_following_simple_agent"},
        }
    ],
    "nemotron_structured": [
        {
            "responses_create_params": responses("Answer by the schema."),
            "schema_str": json.dumps({"type": "object", "required": ["name"]}),
            "schema_type": "json",
            "schema_fields_count": "1",
        }
    ],
    "nemotron_code": [
        {
            "responses_create_params": responses("Add two numbers."),
            "verifier_metadata": {"problem_id": "1", "unit_tests": CODE},
            "hash_id": "ab",
            "dataset": "taco",
        }
    ],
    "llama_nemotron_instructions": [
        {
            "input": asked("No commas, all small."),
            "args": {
                "instruction_id_list": ["change_case:english_lowercase", "punctuation:no_comma"],
                "instruction_kwargs": [{}, {"num_words": None}],
            },
            "category": "instruction_following",
            "license": "odc-by",
            "used_in_training": "yes",
        }
    ],
}
ADDS = """```python
def add(a, b): return a + b
class Solution:
    add = lambda self, a, b: a + b
if __name__ == '__main__':
    print(sum(map(int, input().split())))
```"""
GRADED: dict[Layout, tuple[str, str]] = {  # a right final text, a wrong one
    "dapo_math": ("34 + 0\n\nAnswer: $34$", "Answer: 35"),
    "skywork_math": (r"\boxed{\dfrac{\sqrt3}{2}}", r"\boxed{\frac{3}{2}}"),
    "skywork_code": (ADDS, "```python\nprint(4)\n```"),
    "nemotron_mcqa": (r"It is \boxed{B}", r"It is \boxed{A}"),
    "nemotron_instructions": ("word and more *** one more word", "one paragraph"),
    "nemotron_structured": ('{"name": 1}', "{}"),
    "nemotron_code": (ADDS, "```python\nprint(4)\n```"),
    "llama_nemotron_instructions": ("all of this is written in small letters", "Not, small"),
}
LAYOUTS = [pytest.param(layout, marks=needs_sandbox if "code" in layout else ()) for layout in VERIFICATIONS]


def lines(folder: Path, layout: Layout, rows: list[Any] | None = None) -> Path:
    file = folder / f"{layout}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[layout] if rows is None else rows)))
    return file


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_read_and_graded(tmp_path: Path, layout: Layout) -> None:
    environment = PublicSet("set", layout, lines(tmp_path, layout))
    assert isinstance(environment, BatchEnvironment)
    for problem in environment.problems:
        assert problem.environment == "set" and problem.messages[-1]["content"]
        right, wrong = GRADED[layout]
        if layout == "dapo_math" and problem.answer != "34":
            continue
        assert environment.verify(right, problem.answer) == 1.0
        assert environment.verify(wrong, problem.answer) == 0.0
    drawn: Environment = environment
    assert drawn.problem(random.Random(0)) in environment.problems


def test_repeated_rows_are_one_problem(tmp_path: Path) -> None:
    environment = PublicSet("set", "dapo_math", lines(tmp_path, "dapo_math"))
    assert [problem.answer for problem in environment.problems] == ["34", "40"]
    assert environment.duplicates == 1
    assert environment.problems[0].source.endswith("dapo_math.jsonl:1")
    assert len(PublicSet("set", "dapo_math", lines(tmp_path, "dapo_math"), max_problems=2).problems) == 1


@pytest.mark.parametrize(
    "layout", ["dapo_math", "nemotron_mcqa", "nemotron_instructions", "llama_nemotron_instructions"]
)
def test_every_file_form_gives_the_same_problems(tmp_path: Path, layout: Layout) -> None:
    text = lines(tmp_path, layout).read_text()
    (tmp_path / "mark.jsonl").write_text(text, encoding="utf-8-sig")
    (tmp_path / "crlf.jsonl").write_bytes(text.replace("\n", "\r\n").encode())
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    parquet.write_table(pyarrow.Table.from_pylist(_alike(ROWS[layout])), tmp_path / "table.parquet")
    for folder, suffix in (("shards", "parquet"), ("parts", "jsonl")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "README.md").write_text("about")
        for number, row in enumerate(ROWS[layout]):
            part = tmp_path / folder / f"train-{number:05}-of-00003.{suffix}"
            if suffix == "parquet":
                parquet.write_table(pyarrow.Table.from_pylist(_alike([row])), part)
            else:
                part.write_text(json.dumps(row) + "\n")
    names = ["mark.jsonl", "crlf.jsonl", "packed.jsonl.gz", "table.parquet", "shards", "parts"]
    expected = PublicSet("set", layout, tmp_path / f"{layout}.jsonl").problems
    assert {name: PublicSet("set", layout, tmp_path / name).problems for name in names} == dict.fromkeys(
        names, expected
    )


def _alike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose objects that differ in keys are JSON, as converters write them."""
    mixed = ("kwargs", "args")
    return [{key: json.dumps(value) if key in mixed else value for key, value in row.items()} for row in rows]


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("dapo_math", without(ROWS["dapo_math"][0], "reward_model"), "column reward_model.ground_truth is missing"),
        (
            "dapo_math",
            without(ROWS["dapo_math"][0], "prompt"),
            "column prompt is missing; .*expects a list of messages",
        ),
        ("dapo_math", ROWS["dapo_math"][0] | {"reward_model": {"style": "x"}}, "reward_model.ground_truth is missing"),
        ("dapo_math", ROWS["dapo_math"][0] | {"reward_model": {"ground_truth": '["1", "2"]'}}, "has 2 answers"),
        ("dapo_math", ROWS["dapo_math"][0] | {"prompt": [{"role": "human", "content": "x"}]}, "Write 'user'"),
        ("dapo_math", ROWS["dapo_math"][0] | {"prompt": 3}, "column prompt is '3'"),
        ("dapo_math", ROWS["nemotron_mcqa"][0], "The row has the columns expected_answer, grading_mode, options"),
        ("nemotron_mcqa", ROWS["nemotron_mcqa"][0] | {"expected_answer": "C"}, "none of the options"),
        ("nemotron_mcqa", without(ROWS["nemotron_mcqa"][0], "options"), "column options is missing"),
        ("nemotron_mcqa", ROWS["nemotron_mcqa"][0] | {"options": ["A", None]}, "column options is .* is expected"),
        ("nemotron_instructions", ROWS["nemotron_instructions"][0] | {"kwargs": [None]}, "of equal lengths"),
        (
            "nemotron_instructions",
            ROWS["nemotron_instructions"][0] | {"instruction_id_list": ["a:b"], "kwargs": [{}]},
            "the instruction 'a:b' is not known",
        ),
        (
            "nemotron_instructions",
            ROWS["nemotron_instructions"][0]
            | {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 3}]},
            r"needs \['relation'\]",
        ),
        ("nemotron_structured", ROWS["nemotron_structured"][0] | {"schema_type": "xml"}, "only json can be graded"),
        ("nemotron_structured", ROWS["nemotron_structured"][0] | {"schema_str": "{"}, "column schema_str is"),
        (
            "llama_nemotron_instructions",
            without(ROWS["llama_nemotron_instructions"][0], "args"),
            "column args is missing",
        ),
        ("dapo_math", ["a list"], "is no row of columns"),
    ],
)
def test_rows_without_the_columns_are_refused_by_row_and_column(
    tmp_path: Path, layout: Layout, row: Any, message: str
) -> None:
    file = lines(tmp_path, layout, [ROWS[layout][0], row])
    with pytest.raises(ValueError, match=message) as refused:
        PublicSet("set", layout, file)
    assert str(refused.value).startswith(f"{file}:2: ") and "\n" not in str(refused.value)


@needs_sandbox
def test_code_rows_without_tests_are_refused(tmp_path: Path) -> None:
    row = ROWS["nemotron_code"][0] | {"verifier_metadata": {"unit_tests": {"inputs": ["1"], "outputs": []}}}
    with pytest.raises(ValueError, match="of equal lengths"):
        PublicSet("set", "nemotron_code", lines(tmp_path, "nemotron_code", [row]))


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    file = lines(tmp_path, "dapo_math")
    with pytest.raises(ValueError, match="known are dapo_math"):
        PublicSet("set", "gsm8k", file)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="either path"):
        PublicSet("set", "dapo_math")
    with pytest.raises(ValueError, match="either path"):
        PublicSet("set", "dapo_math", file, hub="a/b")
    with pytest.raises(ValueError, match="max_problems is 0"):
        PublicSet("set", "dapo_math", file, max_problems=0)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="contains no problem"):
        PublicSet("set", "dapo_math", tmp_path / "empty.jsonl")


def test_a_set_of_the_hub_that_cannot_be_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library itself, on a folder that is no data set: what a name that is not there leads to."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"The data set \S+ \(split train\) of the Hugging Face hub cannot be used"):
        PublicSet("set", "dapo_math", hub=str(tmp_path / "missing"))


def test_the_hubs_library_gives_the_same_problems_as_the_file(tmp_path: Path) -> None:
    """`load_dataset` reads a local folder as it reads a repository of the hub."""
    folder = tmp_path / "repository"
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS["dapo_math"]), folder / "train.parquet")
    one, other = (PublicSet("set", "dapo_math", **{key: str(folder)}) for key in ("hub", "path"))  # type: ignore[arg-type]
    assert one.problems == other.problems and one.problems[0].source == f"{folder}/train:1"
