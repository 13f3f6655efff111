"""graders/schema_answers.py: JSON by a schema, within limits."""

import json
from pathlib import Path

import pytest

from lit_puzzle.environments.graders import worker_pool
from lit_puzzle.environments.graders.schema_answers import grade_schemas, read_schema
from lit_puzzle.environments.jsonl import JsonlEnvironment

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "code": {"type": "string", "pattern": "^(a+)+$"},
    },
    "required": ["name"],
    "additionalProperties": False,
}
GOLD = read_schema(SCHEMA, "file:1")


@pytest.mark.parametrize(
    ("final", "grade", "reason"),
    [
        ('{"name": "Tom", "age": 2}', 1.0, "right"),
        ('```json\n{"name": "Tom"}\n```', 1.0, "right"),
        ('{"name": "Tom", "code": "aaa"}', 1.0, "right"),
        ('{"age": 2}', 0.0, "wrong: not allowed at $"),
        ('{"name": "Tom", "age": -1}', 0.0, "wrong: not allowed at $.age"),
        ('{"name": "Tom", "size": 1}', 0.0, "wrong: not allowed at $"),
        ('Here it is: {"name": "Tom"}', 0.0, "wrong: no JSON"),
        ('{"name": "Tom", "name": "Tim"}', 0.0, "wrong: no JSON"),
        ('{"name": "Tom", "age": NaN}', 0.0, "wrong: no JSON"),
        ("[" * 100_000 + "]" * 100_000, 0.0, "wrong: no JSON"),
        ('{"name": ' * 100 + "1" + "}" * 100, 0.0, "wrong: no JSON"),
        ('"' + "a" * 300_000 + '"', 0.0, "wrong: more than 256,000 characters"),
        ("", 0.0, "wrong: no JSON"),
    ],
)
def test_json_by_a_schema(final: str, grade: float, reason: str) -> None:
    (verdict,) = grade_schemas([final], [GOLD])
    assert verdict.correct == grade and verdict.reason.startswith(reason)


def test_a_catastrophic_pattern_is_a_failed_grader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "SECONDS", 1.0)
    hostile = json.dumps({"name": "Tom", "code": "a" * 60 + "b"})
    verdicts = grade_schemas([hostile, '{"name": "Tom"}'], [GOLD, GOLD])
    assert verdicts[0].failed and "no verdict within 1 s" in verdicts[0].reason
    assert verdicts[1].correct == 1.0


@pytest.mark.parametrize(
    "schema",
    [{"$ref": "http://localhost:1/schema"}, {"$ref": "file:///etc/passwd"}, {"$ref": "#"}],
)
def test_schemas_that_cannot_be_used_are_failed_graders(schema: dict[str, str]) -> None:
    (verdict,) = grade_schemas(["1"], [read_schema(schema, "file:1")])
    assert verdict.failed


@pytest.mark.parametrize("value", ["no JSON", "[1]", 3, None])
def test_what_is_no_schema_is_refused_by_its_place(value: object) -> None:
    with pytest.raises(ValueError, match="file:9"):
        read_schema(value, "file:9")


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ({"type": "objekt"}, r"\$\.type"),
        ({"properties": 3}, r"\$\.properties"),
        ({"type": "object", "properties": {"name": {"pattern": "("}}}, r"\$\.properties\.name\.pattern"),
        ({"required": "name"}, r"\$\.required"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "minimum": "one"}, r"\$\.minimum"),
    ],
)
def test_an_invalid_schema_is_refused_by_its_row(schema: dict[str, object], where: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "p", "answer": answer} for answer in (SCHEMA, schema)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"rows\.jsonl.*2.*the schema is not valid at {where}: .*leave the row out"):
        JsonlEnvironment("schemas", file, "schema")
