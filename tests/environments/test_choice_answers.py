"""graders/choice_answers.py: letters with explanations, and the words `A` and `I`."""

import pytest

from lit_puzzle.environments.graders.choice_answers import stated_choice, stated_choices
from lit_puzzle.environments.graders.verifier import Verifier
from lit_puzzle.environments.verdict import UNCLEAR


@pytest.mark.parametrize(
    ("final", "letter"),
    [
        ("**B**", "B"),
        ("**B) 18**", "B"),
        ("**Answer: B**", "B"),
        ("The answer is **(B)**", "B"),
        ("**B. Mitochondria** – A cell organelle ...", "B"),
        ("(B)", "B"),
        (r"\boxed{\text{B}}", "B"),
        ("B – 18", "B"),
        ("I think the answer is I", "I"),
        ("I think it's B.", "B"),
        ("(C) because A is wrong", "C"),
        ("B, because A is wrong", "B"),
        ("**C**\n\nBecause A and B are wrong.", "C"),
        ("I say the answer is (D), not A", "D"),
        ("the answer is D and not A", "D"),
        ("the answer: D, not A", "D"),
        ("I thought of A; the answer" + " " * 65_536 + "is" + "\n" * 9 + "(D)", "D"),
        ("Only F fits", "F"),
        ("Option C", "C"),
        ("Answer: b", "B"),
        ("I'd go with A.", "A"),
        (r"\boxed{[C]}", "C"),
        (r"\boxed{\text{E: A polygenic}}", "E"),
        (r"First \boxed{A}. No: \boxed{B}", "B"),  # the last box counts
        (r"\boxed{A} or \boxed{B}", None),
        (r"\boxed{B} and \boxed{B}", "B"),
        ("b", "B"),
        ("(A) is incorrect. (B) is correct.", "B"),
        ("B is wrong, so C.", "C"),
        ("**B** is right, A is wrong.", "B"),
        ("Not B", None),
        ("The answer is not B", None),
        ("Answer: anything but B", None),
        ("Neither A nor B", None),
        ("I exclude B.", None),
        ("**B** is wrong", None),
        ("B isn't right", None),
        ("B, and also C", None),
        ("B as well as C", None),
        (r"\boxed{B+C}", None),
        (r"\boxed{B;C}", None),
        ("B through D", None),
        ("B C D", None),
        ("B\n\nC", None),
        ("A) 1\nB) 2\nC) 3", None),
        ("A or B", None),
        ("The answer is either A or B", None),
        (r"\boxed{A, B}", None),
        (r"\boxed{A polygenic risk score}", None),
        ("A cell is small.", None),
        ("I am sure.", None),
        ("Paris", None),
        ("the answer I think of", None),
        ("", None),
    ],
)
def test_choices(final: str, letter: str | None) -> None:
    assert stated_choice(final) == letter


def test_the_text_of_an_option_is_a_choice() -> None:
    options = {"A": "Nucleus", "B": "Mitochondria (the powerhouse)"}
    assert stated_choice("mitochondria (the  powerhouse).", "AB", options) == "B"
    assert stated_choice(r"\boxed{Nucleus}", "AB", options) == "A"
    assert stated_choice("The answer is Nucleus", "AB", options) == "A"
    assert stated_choice("Ribosome", "AB", options) is None


def test_letters_that_are_no_options_are_no_choices() -> None:
    assert stated_choice("The answer is E", "ABCD") is None


@pytest.mark.parametrize(
    ("final", "letters"),
    [
        ("BA", "AB"),
        ("A, B", "AB"),
        ("**B and A**", "AB"),
        (r"\boxed{\text{A, B}}", "AB"),
        ("The correct answers are (B), (A), and (D).", "ABD"),
        ("Both A and C", "AC"),
        ("I looked at D.\nAnswer: A;B", "AB"),
        ("C", "C"),
        ("A or B", None),
        ("AA", None),
        ("A\nB", None),
        ("A, because B is wrong", None),
        ("A, Z", None),
        ("", None),
    ],
)
def test_sets_of_letters(final: str, letters: str | None) -> None:
    assert stated_choices(final) == (None if letters is None else set(letters))


@pytest.mark.parametrize("gold", ["AB", "B, A", ["B", "A"], {"letter": ["A", "B"], "options": dict(zip("ABC", "xyz"))}])
def test_the_order_of_letters_counts_for_nothing_where_the_row_names_several(gold: object) -> None:
    verifier = Verifier("choice")
    right = verifier.gold(gold, "file:1")
    verdicts = verifier.verdicts(["BA", "A and B", "A", "ABC", "A or B"], [right] * 5)
    assert [verdict.correct for verdict in verdicts] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert verdicts[4].reason == UNCLEAR
    assert verifier.verdicts(["AB", "BA"], [verifier.gold("B", "file:2")] * 2)[0].correct == 0.0


@pytest.mark.parametrize(
    "gold", ["AA", "AZ", "A or B", ["A", "A"], [], ["word"], {"letter": ["Z"], "options": {"A": "x"}}]
)
def test_what_is_no_set_of_letters_is_refused(gold: object) -> None:
    with pytest.raises(ValueError, match="file:1: "):
        Verifier("choice").gold(gold, "file:1")
