"""Strict reading: what is unknown, missing or of the wrong kind is named."""

from dataclasses import dataclass

import pytest

from lit_puzzle.run.strict_json import check_whole, checked_fields, checked_keys


@dataclass
class Thing:
    size: int
    color: str = "blue"


def test_fields_with_a_default_may_be_missing():
    assert checked_fields(Thing, {"size": 1}) == {"size": 1}
    with pytest.raises(ValueError, match=r"Thing: missing key\(s\) \['size'\]"):
        checked_fields(Thing, {"color": "red"})
    with pytest.raises(ValueError, match=r"Thing: unknown key\(s\) \['shape'\]; allowed: \['size', 'color'\]"):
        checked_fields(Thing, {"size": 1, "shape": 2})


def test_what_is_no_object_is_refused():
    with pytest.raises(ValueError, match="box: expected a JSON object, got list"):
        checked_keys("box", [1], {"size"})


@pytest.mark.parametrize("value", [True, 1.0, "1", 1])
def test_whole_numbers(value):
    check_whole("box", "size", 2, 2)
    with pytest.raises(ValueError, match="box: size must be a whole number of at least 2"):
        check_whole("box", "size", value, 2)
