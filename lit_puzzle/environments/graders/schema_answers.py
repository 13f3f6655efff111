"""Grades whether a final text is JSON that a JSON schema allows.

A text may be one code block. Before the schema is looked at, a text is limited: 256,000 characters, 64 levels, no name
twice, no NaN. Validation runs in a worker process with a time limit, for the patterns of a schema can take a time that
is exponential in a text; a schema that refers to another document is not looked up. Needs jsonschema (extra `graders`).

Reads and writes nothing.
"""

import json
from collections.abc import Sequence
from typing import Any

from lit_puzzle.environments.graders.exact_answers import without_fence
from lit_puzzle.environments.graders.worker_pool import require_library, run_jobs
from lit_puzzle.environments.verdict import RIGHT, Verdict, grader_failed
from lit_puzzle.run.files import parse_json
from lit_puzzle.run.json_lines import check_depth

MAX_CHARACTERS = 256_000


def read_schema(value: Any, place: str) -> str:
    """Return the gold answer of a schema as text.

    Args:
        value: an object, or its JSON.
        place: where it stands, for messages.

    Raises:
        ValueError: no JSON object, no valid schema, or jsonschema is not installed.
    """
    require_library("schema", "The verification `schema`")
    schema = parse_json(value, f"{place}: the schema") if isinstance(value, str) else value
    if not isinstance(schema, dict):
        raise ValueError(f"{place}: a schema must be a JSON object, got {str(value)[:80]!r}.")
    check_depth(schema, f"{place}: the schema")
    if why := invalid_schema(schema):
        raise ValueError(f"{place}: the schema is not valid at {why[:200]}. Mend it or leave the row out.")
    return json.dumps(schema, ensure_ascii=False)


def invalid_schema(schema: dict[str, Any]) -> str:
    """Return where and why a schema is none of its own draft (2020-12 where it names none); empty if it is one."""
    from jsonschema.exceptions import best_match
    from jsonschema.validators import Draft202012Validator, validator_for

    kind = validator_for(schema, default=Draft202012Validator)
    error = best_match(kind(kind.META_SCHEMA, format_checker=kind.FORMAT_CHECKER).iter_errors(schema))
    return "" if error is None else f"{error.json_path}: {error.message}"


def grade_schemas(finals: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
    """Return 1 for each text that is JSON which its schema allows; the reason names the place that is not."""
    values = [_value(final) for final in finals]
    jobs = [
        {"kind": "schema", "schema": json.loads(gold), "value": value}
        for (value, why), gold in zip(values, golds, strict=True)
        if not why
    ]
    replies = iter(run_jobs(jobs))
    return [Verdict(0.0, f"wrong: {why}") if why else _verdict(next(replies)) for _, why in values]


def _value(final: str) -> tuple[Any, str]:
    """Return the value of a text, and why it has none."""
    if len(final) > MAX_CHARACTERS:
        return None, f"more than {MAX_CHARACTERS:,} characters"
    try:
        value = parse_json(without_fence(final), "text")
        check_depth(value, "text")
    except (ValueError, RecursionError) as error:
        return None, f"no JSON: {' '.join(str(error).split())[:120]}"
    return value, ""


def _verdict(reply: dict[str, Any]) -> Verdict:
    if "failed" in reply:
        return grader_failed(reply["failed"])
    return RIGHT if reply["correct"] else Verdict(0.0, f"wrong: not allowed at {reply['why']}"[:200])
