"""environments/answers.py: texts that broke or stopped graders: numbers and blanks without end, nested braces."""

import time
from fractions import Fraction

import pytest

from lit_puzzle.environments.answers import parse_choice, parse_number
from lit_puzzle.environments.long_context_tasks import RecordCount


@pytest.mark.parametrize(
    "text",
    [
        "1" + ",234" * 1433,
        "1" + ",234" * 100_000,
        "9" * 5000,
        "0." + "3" * 5000,
        "1/" + "7" * 5000,
        r"\frac{1}{" + "7" * 5000 + "}",
        r"\boxed{" + "1" * 100_000 + "}",
    ],
)
def test_numbers_without_end_are_no_numbers(text: str) -> None:
    assert parse_number(text) is None


def test_long_numbers_are_read() -> None:
    assert parse_number("1" + ",234" * 100) == Fraction(int("1" + "234" * 100))
    assert parse_number("1" + "0" * 400 + "/" + "1" + "0" * 399) == 10


@pytest.mark.parametrize(
    "text",
    [
        "answer" + " " * 65_536,
        "answer is" + " " * 65_536 + "7",
        "The answer" * 1000 + " " * 65_536 + "(",
        " " * 65_536 + "B",
        r"\boxed{" * 20_000,
        r"\frac{" * 20_000,
        "1," * 50_000,
        "+" * 100_000,
        "A " * 50_000,
    ],
)
def test_no_text_takes_long(text: str) -> None:
    begun = time.process_time()
    parse_choice(text)
    parse_number(text)
    RecordCount().verify(text, "3")
    assert time.process_time() - begun < 2


def test_blanks_change_no_choice() -> None:
    assert parse_choice("I thought of A; the answer" + " " * 65_536 + "is" + "\n" * 9 + "(D)") == "D"
    assert parse_choice("the answer is D and not A") == parse_choice("the answer: D, not A") == "D"
    assert parse_choice("the answer I think of") == "I"


def test_a_count_without_end_is_wrong() -> None:
    for text in ("7" * 5000, "1" + ",234" * 1433, "3 and " + "3" * 5000):
        assert RecordCount().verify(text, "3") == 0.0
    assert RecordCount().verify("0003", "3") == 1.0
