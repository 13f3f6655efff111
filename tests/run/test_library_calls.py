from pathlib import Path

import pytest

from lit_puzzle.report.terminal_text import escaped
from lit_puzzle.run.files import read_text
from lit_puzzle.run.library_calls import library_errors


def test_error_of_a_library_becomes_one_line_with_its_kind() -> None:
    said = r"^model/tokenizer\.json cannot be used: RuntimeError: a b$"
    with pytest.raises(ValueError, match=said) as raised, library_errors("model/tokenizer.json"):
        raise RuntimeError("a\n  b")
    assert isinstance(raised.value.__cause__, RuntimeError)


@pytest.mark.parametrize("value", [None, 3])
def test_mistake_of_this_package_keeps_its_traceback(value: object) -> None:
    """`escaped` is a function of this package, which is given no text."""
    with pytest.raises(AttributeError), library_errors("model/tokenizer.json"):
        escaped(value)  # type: ignore[arg-type]


def test_refusal_of_this_package_inside_a_library_is_the_users() -> None:
    said = r"^config\.json cannot be used: ValueError: x is missing"
    with pytest.raises(ValueError, match=said), library_errors("config.json"):
        read_text(Path("x"))
