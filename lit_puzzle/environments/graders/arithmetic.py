r"""Computes the exact value of a number as people write it: `1,234.5`, `3\frac{1}{2}`, `3^2+0`, `2 * 10^{5}`.

A parser of its own (recursive descent), so that nothing a model writes is ever evaluated as code. Grammar:

    sum      = product (("+" | "-") product)*
    product  = signed (("*" | "/") signed)*
    signed   = ["+" | "-"] power
    power    = atom ["^" exponent]
    atom     = number | number \frac.. (mixed) | \frac group group | \sqrt group | "(" sum ")" | "{" sum "}"

Values are limited to about 4,000 digits and expressions to 32 levels, whatever the exponents: 10^{10^{10}} has no value
here, at once. Roots have one only where it is rational.

Reads and writes nothing. Input: from `plain_math.plain`.
"""

import math
import re
from fractions import Fraction

MAX_DIGITS = 1000  # of one number
MAX_BITS = 14_000  # of numerator and denominator
MAX_DEPTH = 32
GAP = r"[ \u00a0']"
NUMBERS = tuple(
    (re.compile(pattern), group, point)
    for pattern, group, point in (
        (r"[1-9]\d{0,2}(?:,\d{3})++(?:\.\d++)?(?![\d,])", ",", r"\."),
        (rf"[1-9]\d{{0,2}}(?:{GAP}\d{{3}})++(?:[.,]\d++)?(?![\d/]|{GAP}*\\frac)", GAP, "[.,]"),
        (r"[1-9]\d{0,2}(?:\.\d{3})++,\d++(?![\d.,])", r"\.", ","),
        (r"[1-9]\d{0,2}(?:\.\d{3}){2,}+(?![\d.,])", r"\.", ","),
        (r"\d++,\d++(?![\d,])(?!\.\d)", "_", ","),
        (r"\d++(?:\.\d*+)?(?:[eE][+-]?\d{1,3}(?!\d))?", "_", r"\."),
        (r"\.\d++(?:[eE][+-]?\d{1,3}(?!\d))?", "_", r"\."),
    )
)
MIXED = re.compile(r"[ \u00a0]*(?=\\frac)|[ \u00a0]+(?=\d++/\d)")
PLAIN_FRACTION = re.compile(r"(\d++)/(\d++)(?![\d.])")
DIGIT_ARGUMENT = re.compile(r"\s*(\d)")


class NoValueError(ValueError):
    """The text is not a number, or is one too large."""


def leading_value(text: str) -> tuple[Fraction, str]:
    """Return the value of the longest expression at the beginning of a text, and the text after it.

    Args:
        text: plain mathematics.

    Raises:
        NoValueError: it begins with no expression that has a value.
    """
    value, place = _sum(text, 0, 0)
    return value, text[place:]


def _sum(text: str, place: int, depth: int) -> tuple[Fraction, int]:
    value, place = _product(text, place, depth)
    while (sign := _sign(text, place, "+-")) is not None:
        try:
            other, after = _product(text, sign + 1, depth)
        except NoValueError:  # `5 - a`: the expression ends before the sign
            return value, place
        value = _checked(value + other if text[sign] == "+" else value - other)
        place = after
    return value, place


def _product(text: str, place: int, depth: int) -> tuple[Fraction, int]:
    value, place = _signed(text, place, depth)
    while (sign := _sign(text, place, "*/")) is not None:
        try:
            other, after = _signed(text, sign + 1, depth)
        except NoValueError:
            return value, place
        if text[sign] == "/" and other == 0:
            raise NoValueError("division by 0")
        value = _checked(value * other if text[sign] == "*" else value / other)
        place = after
    return value, place


def _sign(text: str, place: int, signs: str) -> int | None:
    place = _skip(text, place)
    return place if place < len(text) and text[place] in signs else None


def _signed(text: str, place: int, depth: int) -> tuple[Fraction, int]:
    place = _skip(text, place)
    if place < len(text) and text[place] in "+-":
        value, after = _power(text, place + 1, depth)
        return (-value if text[place] == "-" else value), after
    return _power(text, place, depth)


def _power(text: str, place: int, depth: int) -> tuple[Fraction, int]:
    base, place = _atom(text, place, depth)
    mark = _skip(text, place)
    width = 2 if text.startswith("**", mark) else 1
    if not text.startswith(("^", "**"), mark):
        return base, place
    if text.startswith("{", _skip(text, mark + width)):
        exponent, after = _group(text, mark + width, depth)
    else:
        exponent, after = _signed(text, mark + width, depth + 1)
    return _raised(base, exponent), after


def _raised(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > MAX_BITS or (base == 0 and exponent < 0):
        raise NoValueError("no rational power")
    if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) > MAX_BITS:
        if abs(base) == 1 or base == 0:
            return base ** (int(exponent) % 2 or 2)
        raise NoValueError("too large")
    return base ** int(exponent)


def _atom(text: str, place: int, depth: int) -> tuple[Fraction, int]:
    place = _skip(text, place)
    if depth > MAX_DEPTH:
        raise NoValueError("too deep")
    if text.startswith("\\frac", place):
        upper, after = _group(text, place + 5, depth)
        lower, after = _group(text, after, depth)
        if lower == 0:
            raise NoValueError("division by 0")
        return _checked(upper / lower), after
    if text.startswith("\\sqrt", place) or text.startswith("√", place):
        value, after = _group(text, place + (5 if text[place] == "\\" else 1), depth)
        return _root(value), after
    if text.startswith(("(", "{"), place):
        return _inside(text, place, depth)
    return _number(text, place, depth)


def _group(text: str, place: int, depth: int) -> tuple[Fraction, int]:
    r"""Read an argument of LaTeX: `{...}`, `(...)`, or one digit (`\frac12`)."""
    place = _skip(text, place)
    if text.startswith(("{", "("), place):
        return _inside(text, place, depth)
    digit = DIGIT_ARGUMENT.match(text, place)
    if digit is None:
        raise NoValueError("no argument")
    return Fraction(int(digit[1])), digit.end()


def _inside(text: str, place: int, depth: int) -> tuple[Fraction, int]:
    value, after = _sum(text, place + 1, depth + 1)
    after = _skip(text, after)
    if not text.startswith({"(": ")", "{": "}"}[text[place]], after):
        raise NoValueError("not closed")
    if text[place] == "(" and "," in text[place:after]:
        raise NoValueError("a pair, not a number with a comma")
    return value, after + 1


def _number(text: str, place: int, depth: int) -> tuple[Fraction, int]:
    for pattern, group, point in NUMBERS:
        found = pattern.match(text, place)
        if found is None:
            continue
        if len(found[0]) > MAX_DIGITS:
            raise NoValueError("too many digits")
        digits = re.sub(point, ".", re.sub(group, "", found[0]))
        return _with_fraction(text, found, Fraction(digits.removesuffix(".")), depth)
    raise NoValueError("not a number")


def _with_fraction(text: str, found: re.Match[str], whole: Fraction, depth: int) -> tuple[Fraction, int]:
    r"""Add the fraction of a mixed number: `3\frac{1}{2}`, `3 1/2`."""
    gap = MIXED.match(text, found.end())
    if gap is None or not found[0].isdigit():
        return whole, found.end()
    if text.startswith("\\frac", gap.end()):
        part, after = _atom(text, gap.end(), depth + 1)
        return whole + part, after
    fraction = PLAIN_FRACTION.match(text, gap.end())
    if fraction is None or len(fraction[0]) > MAX_DIGITS or int(fraction[2]) == 0:
        return whole, found.end()
    return whole + Fraction(int(fraction[1]), int(fraction[2])), fraction.end()


def _root(value: Fraction) -> Fraction:
    if value < 0:
        raise NoValueError("root of a negative number")
    root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    if root * root != value:
        raise NoValueError("no rational root")
    return root


def _checked(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise NoValueError("too large")
    return value


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \u00a0\t\n":
        place += 1
    return place
