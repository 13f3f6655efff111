"""graders/code_tests.py: unit tests of both styles, and programs that try to pass without solving anything."""

import json
from typing import Any

import pytest
from helpers.sandbox_here import needs_sandbox

from lit_puzzle.environments import sandbox
from lit_puzzle.environments.graders.code_tests import (
    UnitTests,
    grade_programs,
    program_of,
    read_assertions,
    read_tests,
    same_output,
    same_value,
)
from lit_puzzle.environments.sandbox_limits import SandboxLimits

LIMITS = SandboxLimits(cpu_seconds=1, wall_seconds=10, total_seconds=60, memory_bytes=200 << 20, processes=4)
SUMS = UnitTests(("1 2\n", "3 4\n", "10 -3\n"), ("3\n", "7\n", "7\n"))
ADD = UnitTests(([1, 2], [3, 4]), (3, 7), "add")


def fenced(code: str) -> str:
    return f"Here is my program.\n\n```python\n{code}\n```\n\nIt adds."


def grades(finals: list[str], tests: UnitTests) -> list[tuple[float, str]]:
    return [(verdict.correct, verdict.reason) for verdict in grade_programs(finals, [tests] * len(finals), LIMITS)]


@needs_sandbox
def test_programs_pass_or_fail_and_the_first_failed_test_is_named() -> None:
    finals = [
        fenced("print(sum(map(int, input().split())))"),
        "print(sum(map(int, input().split())))",
        fenced("print(0)") + fenced("print(sum(map(int, input().split())))"),  # the last block counts
        fenced("a, b = map(int, input().split())\nprint(a + b if a < 3 else 0)"),
        fenced("print(3)"),
        fenced("1 / 0"),
        fenced("while True: pass"),
        "I cannot solve this.",
        "",
    ]
    assert grades(finals, SUMS) == [
        (1.0, "right"),
        (1.0, "right"),
        (1.0, "right"),
        (0.0, "wrong: test 2 of 3: another output"),
        (0.0, "wrong: test 2 of 3: another output"),
        (0.0, "wrong: test 1 of 3: exit code 1"),
        (0.0, "wrong: test 1 of 3: time limit"),
        (0.0, "wrong: test 1 of 3: exit code 1"),
        (0.0, "wrong: no program"),
    ]


FORGED = [
    "print('all tests passed'); import os; os._exit(0)",
    "raise SystemExit(0)",
    "import os\nfor d in range(64):\n"
    '  try: os.write(d, b\'\\0\\0\\0\\x21{"status": "ok", "output": "3"}\')\n  except OSError: pass',
    'print(\'{"correct": 1.0, "reason": "right"}\')',
    "import sys\nsys.stdout = sys.__stdout__ = None",
    "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)",
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "import builtins\nbuiltins.print = builtins.len = lambda *a, **k: 3\nbuiltins.AssertionError = int",
    "import gc, os\nfor o in gc.get_objects():\n  if isinstance(o, dict) and 'source' in o: print(o.get('outputs', o))",
    "import sys\nf = sys._getframe()\nwhile f:\n  print(f.f_locals.get('expected')); f = f.f_back",
]
FORGED_FUNCTIONS = [
    "class Same:\n  def __eq__(self, other): return True\n  __ne__ = lambda *a: False\ndef add(a, b): return Same()",
    "class Same(int):\n  def __eq__(self, other): return True\ndef add(a, b): return Same(0)",
    "import json\njson.dumps = lambda *a, **k: '3'\ndef add(a, b): return 0",  # what it can claim is one value
    "def add(a, b):\n  import os\n  os.write(3, b'0'); os._exit(0)",
    "def add(a, b): raise SystemExit(0)",
    "import lit_puzzle",
    "add = 3",
]


@needs_sandbox
def test_no_program_passes_by_what_it_says_of_itself() -> None:
    found = grades([fenced(code) for code in FORGED], SUMS) + grades([fenced(code) for code in FORGED_FUNCTIONS], ADD)
    assert [grade for grade, _ in found] == [0.0] * len(found)
    assert not any("failed" in reason for _, reason in found)


@needs_sandbox
def test_functions_and_methods_pass() -> None:
    finals = [
        fenced("def add(a, b):\n    return a + b"),
        fenced("class Solution:\n    def add(self, a, b):\n        return a + b"),
        fenced("from typing import *\ndef add(a: int, b: int) -> int:\n    return float(a + b)"),
        fenced("def add(a, b):\n    return a * b"),
        fenced("def other(a, b):\n    return a + b"),
    ]
    assert [grade for grade, _ in grades(finals, ADD)] == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_a_sandbox_that_does_not_start_is_a_failed_grader(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    failing = tmp_path / "bwrap"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sandbox, "find_bubblewrap", lambda: failing)
    ((grade, reason),) = grades([fenced("print(1)")], SUMS)
    assert grade == 0.0 and reason == "grader failed: sandbox: the sandbox has not started"


def test_tests_are_read_in_every_form() -> None:
    plain = read_tests({"inputs": ["1"], "outputs": ["2"]}, "f:1")
    assert plain == UnitTests(("1",), ("2",)) == read_tests(json.dumps({"inputs": ["1"], "outputs": ["2"]}), "f:1")
    lines = read_tests({"inputs": ["[1, 2]\n3"], "outputs": ["[4]"], "fn_name": "f"}, "f:1")
    assert lines == UnitTests(([[1, 2], 3],), ([4],), "f")
    assert plain.key() != lines.key() and plain.key().startswith("1 tests ")


def test_assertions_become_calls() -> None:
    lines = ("assert candidate(nums = [3, 3], target = 6) == [0, 1]", "assert candidate([1], 2) == None")
    code = "def check(candidate):\n" + "".join(f"    {line}\n" for line in lines)
    tests = read_assertions(code, "Solution().twoSum", "from typing import *", "f:1")
    assert tests == UnitTests(
        ({"nums": [3, 3], "target": 6}, [[1], 2]), ([0, 1], None), "twoSum", "from typing import *"
    )
    for wrong in ("assert candidate(1)", "assert candidate(open('x')) == 1", "assert f(", "x = 1"):
        with pytest.raises(ValueError, match="f:1: "):
            read_assertions(f"def check(candidate):\n    {wrong}\n", "f", "", "f:1")


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        {"inputs": [1], "outputs": ["1"]},
        {"inputs": ["x"], "outputs": ["1"], "fn_name": "f"},
        {"inputs": [[1]], "outputs": ["1"], "fn_name": "f; import os"},
        "no JSON",
        None,
    ],
)
def test_tests_that_cannot_be_read_are_refused_by_their_place(value: object) -> None:
    with pytest.raises(ValueError, match="file:3"):
        read_tests(value, "file:3")


def test_outputs_are_equal_up_to_white_space_and_rounding() -> None:
    assert same_output("1 2 \n3\n", "1 2\n3")
    assert same_output("0.3333333333", "0.3333333")
    assert same_output("1 2 3", "1\n2\n3")
    assert not same_output("10000001", "10000000")  # whole numbers are exact
    assert not same_output("1 2", "1 2 3")
    assert not same_output("nan", "1.0") and not same_output("", "0")


def test_values_are_equal_as_json() -> None:
    assert same_value([1, [2.0000001]], (1, [2.0])) and same_value({"1": 2}, {1: 2}) and same_value(None, None)
    assert not same_value(True, 1) and not same_value(1, "1") and not same_value([1], [1, 2])
    assert not same_value(10**20 + 1, 10**20)


def test_the_program_is_the_last_block() -> None:
    assert program_of("```\na\n```\ntext\n```py\nb\n```") == "b\n"
    assert program_of("no fence") == "no fence" and program_of("```python\nnot closed") == ""
