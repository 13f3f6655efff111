"""The layouts of public sets of problems: from a row with their columns to messages and a gold answer.

    dapo_math       prompt (messages), reward_model.ground_truth (text, or JSON list with one)          math
    skywork_math    the same                                                                            math
    skywork_code    prompt, reward_model.ground_truth (JSON of inputs and outputs, or of test_code
                    and entry_point)                                                                    code
    nemotron_mcqa   responses_create_params.input, options ([{letter: text}]), expected_answer          choice
    nemotron_instructions           responses_create_params.input, instruction_id_list, kwargs          instructions
    nemotron_structured             responses_create_params.input, schema_str (or schema)               schema
    nemotron_code   responses_create_params.input, verifier_metadata.unit_tests (inputs, outputs,
                    fn_name)                                                                            code
    llama_nemotron_instructions     input (messages), args (instruction_id_list, instruction_kwargs)    instructions

Other columns (difficulty, source, identifiers, licenses) are not read. Nested columns may be objects or their JSON, as
Parquet files and viewers convert them. Reads and writes nothing.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

from lit_puzzle.environments.graders.code_tests import read_assertions
from lit_puzzle.environments.graders.verifier import Verification
from lit_puzzle.environments.messages import checked_messages

Layout = Literal[
    "dapo_math",
    "skywork_math",
    "skywork_code",
    "nemotron_mcqa",
    "nemotron_instructions",
    "nemotron_structured",
    "nemotron_code",
    "llama_nemotron_instructions",
]
VERIFICATIONS: dict[Layout, Verification] = {
    "dapo_math": "math",
    "skywork_math": "math",
    "skywork_code": "code",
    "nemotron_mcqa": "choice",
    "nemotron_instructions": "instructions",
    "nemotron_structured": "schema",
    "nemotron_code": "code",
    "llama_nemotron_instructions": "instructions",
}
RESPONSES = "responses_create_params.input"
MESSAGES: dict[Layout, str] = {  # columns; the others have RESPONSES
    "dapo_math": "prompt",
    "skywork_math": "prompt",
    "skywork_code": "prompt",
    "llama_nemotron_instructions": "input",
}


def read_row(row: Any, layout: Layout, place: str) -> tuple[tuple[dict[str, Any], ...], Any]:
    """Return the messages and the gold answer of a row, the latter as `Verifier.gold` takes it.

    Args:
        row: of a file.
        layout: which columns it has.
        place: where it stands, for messages.

    Raises:
        ValueError: a column is missing or of another type; the message names file, row, column and what is expected.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: {str(row)[:80]!r} is no row of columns (layout {layout}).")
    source = Columns(row, layout, place)
    messages = _messages(source.get(MESSAGES.get(layout, RESPONSES), (list, str), "a list of messages"), place)
    return messages, _gold(source, layout, place)


class Columns:
    """The columns of a row; a missing or wrong one is refused by its name."""

    def __init__(self, row: Mapping[str, Any], layout: str, place: str) -> None:
        self._row, self._layout, self._place = row, layout, place

    def get(self, name: str, kinds: tuple[type, ...], expected: str) -> Any:
        """Return a column, or a part of one (`column.part`).

        Args:
            name: of the column.
            kinds: types that it may have; other texts are read as JSON of them.
            expected: the same in words.
        """
        value: Any = self._row
        for part in name.split("."):
            value = _parsed(value) if isinstance(value, str) else value
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, str) and str not in kinds:
            value = _parsed(value)
        if value is None or not isinstance(value, kinds):
            what = "is missing" if value is None else f"is {str(value)[:60]!r}"
            raise ValueError(
                f"{self._place}: column {name} {what}; layout {self._layout} expects {expected}. The row has the "
                f"columns {', '.join(sorted(map(str, self._row)))[:200]}."
            )
        return value

    def has(self, name: str) -> bool:
        """Return whether there is a column and it is not null."""
        return self._row.get(name) is not None


def _gold(source: Columns, layout: Layout, place: str) -> Any:
    match layout:
        case "dapo_math" | "skywork_math":
            return _one_answer(source.get("reward_model.ground_truth", (str, int, float, list), "an answer"), place)
        case "skywork_code":
            tests = source.get("reward_model.ground_truth", (dict,), "a JSON object of unit tests")
            if "test_code" not in tests:
                return tests
            entry_point, prefix = str(tests.get("entry_point", "")), str(tests.get("import_prefix") or "")
            return read_assertions(str(tests["test_code"]), entry_point, prefix, place)
        case "nemotron_mcqa":
            options = source.get("options", (list, dict), "a list of {letter: text}")
            pairs = [options] if isinstance(options, dict) else options
            if not all(isinstance(pair, Mapping) for pair in pairs):
                raise ValueError(
                    f"{place}: column options is {str(options)[:60]!r}; a list of {{letter: text}} is expected."
                )
            texts = {key: text for pair in pairs for key, text in dict(pair).items() if text is not None}
            return {"letter": source.get("expected_answer", (str,), "a letter").strip(), "options": texts}
        case "nemotron_structured":
            kind = source.get("schema_type", (str,), "json") if source.has("schema_type") else "json"
            if kind != "json":
                raise ValueError(f"{place}: column schema_type is {kind!r}; only json can be graded. Take the row out.")
            name = "schema" if source.has("schema") and not source.has("schema_str") else "schema_str"
            return source.get(name, (dict,), "a JSON schema")
        case "nemotron_code":
            return source.get("verifier_metadata.unit_tests", (dict,), "an object of inputs and outputs")
        case "nemotron_instructions":
            ids = source.get("instruction_id_list", (list,), "a list of instructions")
            return {"instruction_id_list": ids, "kwargs": source.get("kwargs", (list,), "a list of objects")}
        case "llama_nemotron_instructions":
            return source.get("args", (dict,), "an object of instruction_id_list and instruction_kwargs")


def _one_answer(value: Any, place: str) -> Any:
    """Return a gold answer: itself, or the only one of a list or of its JSON (`["34"]`)."""
    parsed = _parsed(value) if isinstance(value, str) and value.lstrip().startswith('["') else value
    if not isinstance(parsed, list):
        return value
    if len(parsed) != 1:
        raise ValueError(f"{place}: column reward_model.ground_truth has {len(parsed)} answers; one is expected.")
    return parsed[0]


def _messages(value: Any, place: str) -> tuple[dict[str, Any], ...]:
    """Return messages; one text is the user's, and parts of a content are joined."""
    parsed = _parsed(value) if isinstance(value, str) and value.lstrip().startswith("[{") else value
    if isinstance(parsed, str):
        return checked_messages({"prompt": parsed}, place)
    messages = [_message(message) for message in parsed]
    return checked_messages({"messages": messages}, place)


def _message(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return {"role": message.get("role"), "content": content}


def _parsed(text: str) -> Any:
    """Return the value of JSON; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
