"""graders/exact_answers.py: equal texts, whatever is around them."""

import pytest

from lit_puzzle.environments.graders.exact_answers import same_text

TOM = '{"name": "Tom", "age": 2}'


@pytest.mark.parametrize(
    ("gold", "final", "same"),
    [
        (TOM, TOM, True),
        (TOM, f"```json\n{TOM}\n```", True),
        (TOM, f"```\n{TOM}\n```", True),
        ("Paris", "Paris.", True),
        ("Paris", "**Paris**", True),
        ("to be", "  to  be\n", True),
        ("Paris", "paris", False),
        ("Paris", "Paris or London", False),
        ("a.", "a", True),
        (".", ".", True),
        ("a\n```b", "```\na\n```b\n```", False),
        ("", "", True),
    ],
)
def test_same_text(gold: str, final: str, same: bool) -> None:
    assert same_text(final, gold) is same
