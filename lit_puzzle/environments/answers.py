"""The answer in a completion: its final text, and the number or the choice that the text states.

Completions are harmony text decoded with special tokens:
``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>ANSWER<|return|>``.
Reads and writes nothing.
"""

import re
from fractions import Fraction

_RETURN = "<|return|>"
_FINAL = re.compile(r"<\|channel\|>\s*final\s*<\|message\|>")
_CONTROL = re.compile(r"<\|(start|end|message|channel|call|constrain)\|>")
_NUMBER = r"[+-]?(?:\d{1,100}(?:,\d{3})*(?:\.\d{0,100})?|\.\d{1,100})(?:[eE][+-]?\d{1,3})?(?:/\d{1,100})?"


def final_text(completion: str) -> str | None:
    """The text of the final channel, or None if the answer did not end by ``<|return|>`` inside a final channel."""
    body, ended, _ = completion.partition(_RETURN)
    answer = _FINAL.split(body)[-1]
    if not ended or answer == body or _CONTROL.search(answer):
        return None
    return answer


def _boxed(text: str) -> str:
    r"""What the last ``\boxed{...}`` holds (no nested braces), else the text itself."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return found[-1] if found else text


def parse_number(text: str) -> Fraction | None:
    r"""The last number in a text as an exact fraction, or None; reads ``\frac{1}{2}``, ``1/2``, ``0.50``, ``1,000``."""
    plain = re.sub(r"\\[dt]?frac\{([+-]?\d+)\}\{(\d+)\}", r"\1/\2", text)
    found = re.findall(_NUMBER, _boxed(plain))
    if not found:
        return None
    numerator, _, denominator = found[-1].replace(",", "").partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / int(denominator or 1)


def same_number(one: Fraction | None, other: Fraction | None) -> bool:
    """Equality; integers exactly, other numbers to a relative 1e-6 (so that rounded decimals of a fraction count)."""
    if one is None or other is None:
        return False
    return one == other or (other.denominator != 1 and abs(one - other) <= abs(other) / 1_000_000)


def parse_choice(text: str) -> str | None:
    """The chosen letter A-J: a leading one, else the one after "answer", else the only one named; None if unclear."""
    plain = _boxed(text).strip()
    leading = re.match(r"\(?([A-J])(?:[).:]|$)", plain)
    stated = re.findall(r"(?i:answer)\s*(?:(?i:is)|:)?\s*\(?([A-J])\b", plain)
    named = set(re.findall(r"\b([A-J])\b", plain))
    if leading:
        return str(leading[1])
    if stated:
        return str(stated[-1])
    return named.pop() if len(named) == 1 else None
