"""Finds the number or the choice that the final text of a completion states.

The final text comes from `lit_puzzle.environments.answer_formats`. Reads and writes nothing.
"""

import re
from fractions import Fraction

# Every pattern here takes time proportional to the text, whatever the text: no part can give back what it has matched.
_NUMBER = re.compile(r"[+-]?(?:\d++(?:,\d{3})*+(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d{1,3}+)?(?:/\d++)?")
_FRACTION = re.compile(r"\\[dt]?frac\{([+-]?\d++)\}\{(\d++)\}")
_BOXED = re.compile(r"\\boxed\{([^{}]*+)\}")
_STATED = re.compile(r"(?i:answer)\s*+(?:(?i:is)|:)?\s*+\(?([A-J])\b")
MAX_DIGITS = 1000  # Python's int() refuses 4,300 digits


def _boxed(text: str) -> str:
    r"""Return the content of the last ``\boxed{...}`` (no nested braces), or the text itself if there is none."""
    found = _BOXED.findall(text)
    return found[-1] if found else text


def parse_number(text: str) -> Fraction | None:
    r"""Return the last number in a text as an exact fraction; None if there is none or it has over 1,000 characters.

    Understands ``\frac{1}{2}``, ``1/2``, ``0.50`` and ``1,000``.
    """
    found = _NUMBER.findall(_boxed(_FRACTION.sub(r"\1/\2", text)))
    if not found or len(found[-1]) > MAX_DIGITS:
        return None
    numerator, _, denominator = found[-1].replace(",", "").partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / int(denominator or 1)


def same_number(one: Fraction | None, other: Fraction | None) -> bool:
    """Return whether two numbers are equal: integers exactly, others to a relative 1e-6 (rounded decimals count)."""
    if one is None or other is None:
        return False
    return one == other or (other.denominator != 1 and abs(one - other) <= abs(other) / 1_000_000)


def parse_choice(text: str) -> str | None:
    """Return the chosen letter A-J: a leading one, else the one after "answer", else the only one named; or None."""
    plain = _boxed(text).strip()
    leading = re.match(r"\(?([A-J])(?:[).:]|$)", plain)
    stated = _STATED.findall(plain)
    named = set(re.findall(r"\b([A-J])\b", plain))
    if leading:
        return str(leading[1])
    if stated:
        return str(stated[-1])
    return named.pop() if len(named) == 1 else None
