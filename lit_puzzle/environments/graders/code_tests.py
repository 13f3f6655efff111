r"""Grades programs by unit tests, in the sandbox: 1 if every test passes, else 0 with the first one that does not.

The program is the last code block of the final text (the whole text, if it has none). Tests are of two styles: standard
input and output, or calls of a function (also a method of a class `Solution`). What a program printed or returned is
compared out here; the sandbox never sees what is expected, so no program can pass by what it says of itself.

    stdin/stdout    equal lines up to white space at their ends; else equal words, numbers to 1e-6
    function        equal JSON values, tuples as lists, numbers to 1e-6

Reads and writes nothing. Memory: the tests of all problems. Limits: `SandboxLimits`.
"""

import ast
import hashlib
import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

from lit_puzzle.environments.graders.worker_pool import cores
from lit_puzzle.environments.sandbox import SandboxError, run_program
from lit_puzzle.environments.sandbox_limits import SandboxLimits
from lit_puzzle.environments.verdict import RIGHT, Verdict, grader_failed

MAX_CHARACTERS = 200_000  # of a program
MAX_INPUT = 8 << 20
BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
FORM = '{"inputs": [...], "outputs": [...], "fn_name": text (optional)}'
RELATIVE, ABSOLUTE = 1e-6, 1e-9


@dataclass(frozen=True)
class UnitTests:
    """Tests of one problem.

    Attributes:
        inputs: texts of standard input, or arguments of the function: a list, or an object of names.
        outputs: what is expected of each: texts, or values.
        function: name of the function; None: standard input and output.
        prefix: what stands before every program, such as imports.
    """

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    function: str | None = None
    prefix: str = ""

    def key(self) -> str:
        """Return the text that stands for these tests: their number and a hash."""
        data = json.dumps([self.inputs, self.outputs, self.function, self.prefix], sort_keys=True).encode()
        return f"{len(self.inputs)} tests {hashlib.sha256(data).hexdigest()[:32]}"


def read_tests(value: Any, place: str) -> UnitTests:
    """Return the unit tests of a row.

    Args:
        value: an object of the form above (`function` is another name of `fn_name`), or its JSON.
        place: where it stands, for messages.

    Raises:
        ValueError: another form, no test, or numbers of inputs and outputs that differ.
    """
    tests = _json(value, place) if isinstance(value, str) else value
    given = tests if isinstance(tests, dict) else {}
    inputs, outputs = given.get("inputs"), given.get("outputs")
    name = given.get("fn_name") or given.get("function") or None
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{place}: unit tests must have the form {FORM}, of equal lengths; got {str(value)[:120]!r}.")
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"{place}: fn_name {name!r} is no name of a function.")
    if name is None:
        ok = all(isinstance(text, str) and len(text) <= MAX_INPUT for text in [*inputs, *outputs])
        if not ok:
            raise ValueError(f"{place}: inputs and outputs without fn_name must be texts of up to 8 MiB.")
        return UnitTests(tuple(inputs), tuple(outputs))
    arguments = tuple(_arguments(one, place) for one in inputs)
    return UnitTests(arguments, tuple(_loads(one) if isinstance(one, str) else one for one in outputs), name)


def read_assertions(code: str, entry_point: str, prefix: str, place: str) -> UnitTests:
    """Return the tests of a function `check` with lines `assert candidate(...) == value`, as LeetCode sets have it.

    Assertions cannot be trusted where the program runs, so they become calls and expected values.

    Raises:
        ValueError: an assertion of another form.
    """
    inputs, outputs = [], []
    try:
        nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)]
        for node in nodes:
            match node.test:
                case ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[expected]):
                    named = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
                    plain = [ast.literal_eval(part) for part in call.args]
                    inputs.append(named if named and not plain else plain)
                    outputs.append(ast.literal_eval(expected))
                case _:
                    raise ValueError(f"the assertion in line {node.lineno}")
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{place}: test_code must consist of `assert candidate(...) == value` with plain values: {error}"[:300]
        ) from None
    name = entry_point.rpartition(".")[2].strip("()")
    return replace(read_tests({"inputs": inputs, "outputs": outputs, "fn_name": name}, place), prefix=prefix)


def grade_programs(finals: Sequence[str], tests: Sequence[UnitTests], limits: SandboxLimits) -> list[Verdict]:
    """Return the verdict on each final text; as many sandboxes run at once as there are cores."""
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        return list(pool.map(grade_program, finals, tests, repeat(limits)))


def grade_program(final: str, tests: UnitTests, limits: SandboxLimits) -> Verdict:
    """Return the verdict on one final text.

    Args:
        final: the text.
        tests: of the problem.
        limits: of the program.
    """
    program = program_of(final)
    source = f"{tests.prefix}\n{program}" if tests.prefix and program.strip() else program
    if not source.strip() or len(source) > MAX_CHARACTERS:
        return Verdict(0.0, "wrong: no program" if not source.strip() else "wrong: program too long")
    passed = 0
    try:
        for outcome in run_program(source, tests.inputs, limits, tests.function):
            expected = tests.outputs[passed]
            if outcome.status != "ok":
                return Verdict(0.0, f"wrong: test {passed + 1} of {len(tests.inputs)}: {outcome.status}")
            if not (
                same_value(_loads(outcome.output), expected)
                if tests.function
                else same_output(outcome.output, expected)
            ):
                return Verdict(0.0, f"wrong: test {passed + 1} of {len(tests.inputs)}: another output")
            passed += 1
    except (SandboxError, OSError) as error:
        return grader_failed(f"sandbox: {error}")
    return RIGHT if passed == len(tests.inputs) else Verdict(0.0, f"wrong: test {passed + 1}: sandbox ended")


def program_of(final: str) -> str:
    """Return the program in a final text."""
    blocks = BLOCK.findall(final[-4 * MAX_CHARACTERS :])
    return blocks[-1] if blocks else final if "```" not in final else ""


def same_output(printed: str, expected: str) -> bool:
    """Return whether what was printed is what is expected."""
    one, other = ([line.rstrip() for line in text.strip().splitlines()] for text in (printed, expected))
    if one == other:
        return True
    words, wanted = printed.split(), expected.split()
    return len(words) == len(wanted) and all(map(_same_word, words, wanted))


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    if not any(sign in wanted for sign in ".eE") or len(word) > 64 or len(wanted) > 64:  # whole numbers are exact
        return False
    try:
        return math.isclose(float(word), float(wanted), rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    except ValueError:
        return False


def same_value(value: Any, expected: Any) -> bool:
    """Return whether two JSON values are equal; whole numbers exactly, others to 1e-6."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        inexact = isinstance(value, float) or isinstance(expected, float)
        return math.isclose(value, expected, rel_tol=RELATIVE, abs_tol=ABSOLUTE) if inexact else value == expected
    if isinstance(value, list) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        keys = {str(key): part for key, part in expected.items()}
        return value.keys() == keys.keys() and all(same_value(part, keys[key]) for key, part in value.items())
    return type(value) is type(expected) and value == expected


def _arguments(given: Any, place: str) -> Any:
    """Return the arguments of a call: a list, an object of names, or JSON, a line for each argument."""
    if isinstance(given, str):
        return [_json(line, place) for line in given.splitlines() if line.strip()]
    if isinstance(given, list | tuple | dict):
        return given
    raise ValueError(f"{place}: inputs of a function must be lists of arguments, got {str(given)[:80]!r}.")


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: {text[:80]!r} is not JSON: {error}") from None


def _loads(text: str) -> Any:
    """Return the value of JSON, or the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
