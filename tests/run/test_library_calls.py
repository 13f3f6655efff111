import pytest

from lit_puzzle.run.library_calls import library_errors


def test_error_of_a_library_becomes_one_line_with_its_kind() -> None:
    said = r"^model/tokenizer\.json cannot be used: RuntimeError: a b$"
    with pytest.raises(ValueError, match=said) as raised, library_errors("model/tokenizer.json"):
        raise RuntimeError("a\n  b")
    assert isinstance(raised.value.__cause__, RuntimeError)
