"""graders/number_answers.py and arithmetic.py: which number a final text states; nothing is guessed or evaluated."""

import random
from fractions import Fraction

import pytest

from lit_puzzle.environments.graders.arithmetic import NoValueError, leading_value
from lit_puzzle.environments.graders.number_answers import Number, read_number, same_number, stated_number

RIGHT = [
    ("18", "**18**"),
    ("18", "She makes **$18** every day at the farmers' market (9 eggs at $2)."),
    ("18", r"\boxed{18}"),
    ("18", r"$\boxed{\$18}$"),
    ("18", "#### 18"),
    ("18", "The answer to the question is 18. I hope this helps!"),
    ("18", "**Answer:**\n18"),
    ("18", "Step 1: 5\n\n**Answer: 18 dollars per day**"),
    ("18", "So she makes 18 dollars."),
    ("1234", "1\u202f234"),
    ("1234", r"\boxed{1{,}234}"),
    ("1000", r"\boxed{1{,}000}"),
    ("1234", r"\boxed{1\,234}"),
    ("1234", "1 234"),
    ("1234", "1'234"),
    ("1234567", "1.234.567"),
    ("1234.56", "1.234,56"),
    ("1234.5", "The answer is $1,234.50."),
    ("3.5", "3,5"),
    ("0.125", "0,125"),
    ("-5", "\u22125"),
    ("-5", r"\boxed{-\$5}"),
    ("3/4", r"\boxed{\dfrac34}"),
    ("0.75", r"**Final Answer:** $\frac{3}{4}$"),
    ("0.5", r"\frac12"),
    ("3.5", r"3\frac{1}{2}"),
    ("3.5", "3 1/2"),
    ("2.5", "2½"),
    ("9", r"\boxed{3^2+0}"),
    ("1500", r"\boxed{1.5\times10^{3}}"),
    ("4", r"\boxed{\sqrt{16}}"),
    ("25", "x = 5^2 = 25 square units (cm^2)"),
    ("25", r"\boxed{25\text{ cm}^2}"),
    ("25 cm", "25 centimeters"),
    ("60", r"\boxed{60^\circ}"),
    ("5", r"5\text{ km/h}"),
    ("5000000", "5 million"),
    ("50", r"50\%"),
    ("0.5", "50%"),
    ("50%", "The answer is 50 percent"),
    ("7", r"\boxed{x=7}"),
    ("18", r"\boxed{17}, no: \boxed{18}"),
    ("1/3", "0.3333333"),
    ("1000", "1e3"),
    ("-12", "The temperature is minus 12 degrees."),
    ("12000000", "There are 12 million people."),
    ("12", "There are 12 more apples."),
    ("12", "<answer>12</answer>"),
    ("12", "\u200f12\u200f"),
    ("12", r"\boxed{12} and \boxed{12}"),
]
WRONG = [
    ("3/4", r"\boxed{-\dfrac{3}{4}}"),
    ("10", "10^{10}"),
    ("2", r"\boxed{2\pi}"),
    ("2", r"\boxed{(1,2)}"),
    ("2", r"\boxed{[1,2]}"),
    ("1", r"\boxed{\{1,2\}}"),
    ("2", r"\boxed{2x}"),
    ("7", "7:30"),
    ("7", r"\boxed{x \ge 7}"),
    ("7", r"\boxed{x<=7}"),
    ("0.333333", "0.33"),
    ("5", "\u22125"),
    ("5", "5 or 6"),
    ("5", r"\boxed{5 \text{ or } 6}"),
    ("5", "between 5 and 7"),
    ("5", "the answer is not 5 but 6"),
    ("5", "5 million"),
    ("5", "5!"),
    ("25 cm", "25 m"),
    ("2", "2 hours 30 minutes"),
    ("7", "She has 5 apples and 7 pears"),
    ("18", "The total is 18.\n" + r"\boxed{17}"),  # the right number stands in the text, the answer is another
    ("18", "18 is wrong, so the answer is 19."),
    ("18", r"\boxed{17} and \boxed{18"),  # a box that is not closed is no answer
    ("10", "10**10**10"),
    ("1", "1" + ",000" * 1500),
    *(("12", text) for text in ("The answer is not 12", "No solution; 12 doesn't work.", "x > 12", "≥ 12", "minus 12")),
    *(("12", text) for text in ("12 squared", "12 sin x", "12 π", "12 pi", "12 x", "12 factorial", "12 below zero")),
    *(("12", text) for text in ("12 hundredths", "12 lakh", "12bn", "12 mn", "12 per mille", "There are 12 million.")),
    ("2", "2 thirds"),
    ("12", r"\boxed{10} or \boxed{12}"),
]


@pytest.mark.parametrize(("gold", "final"), RIGHT)
def test_right_numbers(gold: str, final: str) -> None:
    assert same_number(stated_number(final), read_number(gold))


@pytest.mark.parametrize(("gold", "final"), WRONG)
def test_wrong_numbers(gold: str, final: str) -> None:
    assert not same_number(stated_number(final), read_number(gold))


@pytest.mark.parametrize("text", ["She has 5 apples and 7 pears", "7:30", r"\boxed{2\pi}", "5 or 6", "none", "1/0", ""])
def test_a_number_that_cannot_be_told_is_none(text: str) -> None:
    assert stated_number(text) is None


BOUNDS = [
    "at least 12",
    "The answer is at most 12.",
    "**at least 12**",
    "at least **12**",
    "more than $12",
    "12 or more",
]
BOUNDS += ["12 people or fewer", "Answer: under 12", "≥ 12", r"\boxed{\text{at least }12}", "no more than 12"]


@pytest.mark.parametrize("text", BOUNDS)
def test_a_bound_is_no_number(text: str) -> None:
    assert stated_number(text) is None
    assert same_number(stated_number("The minimum is 12."), read_number("12"))
    assert same_number(stated_number(r"It is at least 3, so \boxed{12}"), read_number("12"))


@pytest.mark.parametrize("gold", [r"\sqrt{2}", "12:30", r"\frac{\pi}{4}", "many", "(1,2)", "2x", ""])
def test_what_is_no_number_is_read_as_none(gold: str) -> None:
    assert read_number(gold) is None


def test_a_power_is_not_its_exponent() -> None:
    assert read_number("10^{5}") == Number(Fraction(100_000))
    assert not same_number(stated_number("5"), read_number("10^{5}"))


def test_arithmetic_is_that_of_python_on_random_expressions() -> None:
    rng = random.Random(0)

    def expression(depth: int) -> str:
        if depth == 0:
            return str(rng.randint(0, 20))
        one, other = expression(depth - 1), expression(depth - 1)
        return rng.choice(
            [f"({one})+{other}", f"{one}-({other})", f"({one})*({other})", f"({one})^{rng.randint(0, 3)}"]
        )

    for _ in range(300):
        text = expression(rng.randint(0, 4))
        expected = eval(text.replace("^", "**"))
        if expected.bit_length() < 10_000:
            assert leading_value(text) == (expected, "")


@pytest.mark.parametrize(
    "text",
    ["10^{10^{10}}", "9^{9^{9}}", "2^{14001}", "(" * 33 + "1" + ")" * 33, "0^{-1}", "2^{1/2}", "9" * 1001, "-" * 5, ""],
)
def test_values_without_bound_are_none(text: str) -> None:
    with pytest.raises(NoValueError):
        leading_value(text)


def test_powers_of_one_have_a_value_whatever_the_exponent() -> None:
    assert [leading_value(f"({base})^{{13999}}")[0] for base in (0, 1, -1)] == [0, 1, -1]
