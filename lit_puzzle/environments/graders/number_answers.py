r"""Reads the number that a final text states, exactly, and compares numbers.

Understands signs, thousands separators (`1,234`, `1{,}234`, `1 234`, `1.234,5`), decimal commas, fractions, mixed
numbers, powers and sums of numbers, percent, currencies and units. A text whose number cannot be told (two numbers and
nothing that points to one, `7:30`, `2\pi`, `(1,2)`) states none: nothing is guessed.

    equal(answer, gold) = answer == gold                            gold a whole number
                          |answer - gold| <= 1e-6 |gold|            otherwise (a rounded decimal counts)

Reads and writes nothing. Time proportional to the text; no value has more than about 4,000 digits.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from lit_puzzle.environments.graders.arithmetic import NoValueError, leading_value
from lit_puzzle.environments.graders.final_answer import BOLD, bold_parts, find_answer
from lit_puzzle.environments.graders.plain_math import plain

LEAD = re.compile(r"^(?:[*_\s]|≈|\\approx|~|(?:about|approximately|exactly|US|USD|EUR)\b|\\?[$€£¥])+")
UNIT = re.compile(r"^[A-Za-zµμΩ'’$€£\\]{1,30}(?:\^?\{?-?[1-9]\}?)?[.,]?$")
SHORT_UNITS = frozenset("mgshlLNJWKCFVATΩ")
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
NO_UNIT = frozenset(
    [
        "or",
        "and",
        "to",
        "pi",
        "sqrt",
        "over",
        "mod",
        "less",
        "more",
        "times",
        "plus",
        "minus",
        "half",
        "not",
        "out",
        "of",
        "by",
        "than",
        "between",
        "through",
        "until",
        "divided",
        "factorial",
        "infinity",
        *("squared", "cubed", "sin", "cos", "tan", "log", "ln", "below", "mille"),
        *("lakh", "crore", "bn", "mn", "tn", "quadrillion", "quintillion"),
        *("thirds", "fifths", "sixths", "sevenths", "eighths", "ninths", "tenths", "hundredths", "thousandths"),
    ]
)
LENGTHS = {"mm": "mm", "millimeter": "mm", "cm": "cm", "centimeter": "cm", "m": "m", "meter": "m", "metre": "m"} | {
    "km": "km", "kilometer": "km", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "ft": "ft", "mile": "mi",
    "g": "g", "gram": "g", "kg": "kg", "kilogram": "kg", "s": "s", "second": "s", "min": "min", "minute": "min",
    "h": "h", "hour": "h", "hr": "h", "day": "d", "cent": "ct", "dollar": "$", "euro": "€",
}  # fmt: skip
SENTENCE_WORDS = frozenset(  # that do not change a number in a sentence: `12 of them`, `12 more`
    ["or", "and", "to", "by", "of", "out", "more", "less", "than", "between", "through", "until", "not"]
)
DENIED = re.compile(  # `not 12`, `> 12`; `12 less than x`, `12 below zero`, `12 does not work`
    r"(?i)(?:\b(?:not|cannot|never|neither|except)\b|n['’]t\b|[<>≤≥≠])(?=[^\d\n]{0,200}\d)|\bthan [a-z]$"
    r"|\b(?:below zero|per mille)\b|\b(?:does|is|was)(?:n['’]t|(?: not)?) (?:work|wrong|incorrect|possible)\b"
)
COMPARED = r"(?:more|less|fewer|greater|larger|smaller|higher|lower)"
BOUND = re.compile(  # `at least 12`, `12 or more`: a bound is not a number
    rf"(?i)\b(?:at (?:least|most)|{COMPARED} than|up to|over|under|above|below)\s+[$€£\\]*(?=-?\d)"
    rf"|\d\s+(?:[a-z]+\s+)?or (?:{COMPARED}|above|below)\b"
)
TAG = re.compile(r"</?[A-Za-z]{1,20}>")
LONE = re.compile(r"(?<![\w.,:/^{}()\\+*=-])-?(?:\d++(?:[.,]\d++)*+)%?(?![\w:/^{}(\\*+=!-])")


@dataclass(frozen=True)
class Number:
    """A number as it was stated.

    Attributes:
        value: as written: 50 for `50%`.
        percent: whether it is in percent.
        unit: its unit in one spelling if that is a well-known one, else empty.
    """

    value: Fraction
    percent: bool = False
    unit: str = ""


def read_number(text: str) -> Number | None:
    """Return the number that an answer consists of, with or without a unit; None if it is anything else."""
    text = plain(text.strip().strip("*_ ").removesuffix("."))
    text = text.rpartition("=")[2] if not re.search(r"[<>≤≥,]\s*=|\\[gl]e", text) else text
    text = LEAD.sub("", text.replace("\\$", "$").strip("$ ")).strip()
    negative = re.match(r"-\s*\\?[$€£]\s*", text)
    text = f"-{text[negative.end() :]}" if negative else text
    text = re.sub(r"(?i)^(?:minus|negative)\s+(?=\d)", "-", text)
    try:
        value, rest = leading_value(text)
    except NoValueError:
        return None
    if re.match(r"\s*(?:%|per ?cent\b)", rest):
        after = re.sub(r"^\s*(?:%|per ?cent)", "", rest)
        return Number(value, percent=True) if _is_unit(f" {after}") else None
    scale = next((factor for word, factor in SCALES.items() if re.match(rf"\s*{word}s?\b", rest)), 1)
    rest = re.sub(rf"^\s*(?:{'|'.join(SCALES)})s?\b", "", rest)
    return Number(value * scale, unit=_known_unit(rest)) if _is_unit(rest) else None


def _is_unit(rest: str) -> bool:
    """Return whether what follows a number is a unit or words, and nothing that changes its value."""
    if not rest.strip(" .,$\u00a0"):
        return True
    words = [word for word in re.split(r"[\s/*()·\u00a0-]+", rest.strip("$ ")) if word.strip(".,")]
    lower = [word.lower().strip(".,") for word in words]
    if not words or len(words) > 24 or not all(map(UNIT.match, words)) or not NO_UNIT.isdisjoint(lower):
        return False
    if any("\\" in word for word in words):
        return False
    glued = rest[:1].isalpha()
    first = re.match(r"[^\W\d]+", words[0])
    letters = first[0] if first else words[0]
    return len(letters) > 1 or (letters in SHORT_UNITS and not glued) or (letters in {"a", "A"} and len(words) > 1)


def _known_unit(rest: str) -> str:
    word = re.match(r"[\s$]*([A-Za-z]+)\^?\{?(\d?)", rest)
    return LENGTHS[key] + word[2] if word and (key := word[1].lower().removesuffix("s")) in LENGTHS else ""


def stated_number(text: str) -> Number | None:
    """Return the number that a final text gives as its answer; None if it gives none, or it cannot be told which."""
    found = find_answer(text)
    if found is None:
        return None
    if BOUND.search(plain(BOLD.sub(r"\1", found.text))):
        return None
    direct = read_number(found.text)
    if found.how == "marked":
        return direct if direct is not None or "\\boxed" in text else _lone_number(found.text)
    bold = [number for part in bold_parts(text) if (number := read_number(part)) is not None]
    if bold and (len(set(bold)) == 1 or read_number((bold_parts(found.text) or [""])[-1]) is not None):
        return bold[-1]
    return direct if direct is not None else _lone_number(found.text)


def _lone_number(line: str) -> Number | None:
    """Return the number of a sentence that has only one and no mathematics around it."""
    line = plain(BOLD.sub(r"\1", line).removesuffix("."))
    line = TAG.sub(" ", re.sub(r"\\?[$€£]", "", line))
    found = list(LONE.finditer(line)) if "\\" not in line and not DENIED.search(line) else []
    runs = re.findall(r"\d++(?:[.,]\d++)*+", line)
    return _in_sentence(line, found[0]) if len(found) == len(runs) == 1 else None


def _in_sentence(line: str, found: re.Match[str]) -> Number | None:
    """Return a number with the words beside it that say its sign or scale; None if one changes it otherwise."""
    sign = "-" if re.search(r"(?i)\b(?:minus|negative)\s+$", line[: found.start()]) else ""
    behind = re.match(r"\s*+([^\W\d]++|[^\w\s.,;:!?*_()\"'’-])", line[found.end() :])
    word = behind[1].lower() if behind else ""
    if word in SCALES or word.removesuffix("s") in SCALES or word == "percent":
        return read_number(f"{sign}{found[0]} {word}")
    if len(word) == 1 and word not in "ai%" and behind is not None and behind[1] not in SHORT_UNITS:
        return None
    return None if word in NO_UNIT - SENTENCE_WORDS else read_number(sign + found[0])


def same_number(answer: Number | None, gold: Number | None) -> bool:
    """Return whether two stated numbers are equal.

    A percentage equals the same number without a sign (the problem may ask for percent) and its hundredth. Two
    different well-known units are never equal; one that only one side names is not compared.
    """
    if answer is None or gold is None or (answer.unit and gold.unit and answer.unit != gold.unit):
        return False
    if answer.percent == gold.percent:
        return _equal(answer.value, gold.value)
    hundredth = answer.value / 100 if answer.percent else answer.value * 100
    return _equal(answer.value, gold.value) or _equal(hundredth, gold.value)


def _equal(answer: Fraction, gold: Fraction) -> bool:
    return answer == gold or (gold.denominator != 1 and abs(answer - gold) <= abs(gold) / 1_000_000)
