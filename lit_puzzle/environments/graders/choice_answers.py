r"""Reads which option a final text chooses: a letter, with or without explanation, or the text of an option.

Looked at in this order: a box, what is said to be the answer, what is bold, the beginning of the text, and the only
letter that is named. `A` and `I` are also English words: they count only where they cannot be one. A text that names
several letters and points to none chooses nothing, and neither does one that lists options or denies its letter.

Where a problem has several right options, its answer is a set of letters (`stated_choices`): all of them, in any order.

Reads and writes nothing. Time proportional to the text.
"""

import re
from collections.abc import Mapping

from lit_puzzle.environments.graders.final_answer import MAX_CHARACTERS, bold_parts, find_answer
from lit_puzzle.environments.graders.plain_math import plain

LETTERS = "ABCDEFGHIJ"
NO_WORD = r"(?!\s+(?!(?:and|or|because|since|as|not|but|is)\b)[a-z]|['’][a-z])"  # not `A cell`, `I think`, `I'm`
OTHER = rf"[(\[]?(?:[B-HJ-Z](?![\w'’])|[AI](?![\w'’]){NO_WORD})"
JOINED = r"\s*(?:[,/&+;-]|\bor\b|\band\b|\bplus\b|\bthrough\b|\bto\b|,?\s*\bas well as\b)(?:\s*(?:and|or|also)\b)*\s*"
NO_OTHER = rf"(?!{JOINED}{OTHER}| +[B-HJ](?= [A-Z]\b| *$)|\s*\^)"  # not `A or B`
LETTER = rf"([B-HJ-Z](?![\w'’])|[AI](?![\w'’]){NO_WORD}){NO_OTHER}"
CHOSEN = re.compile(rf"(?:(?i:option|choice|answer|letter)\s*)?[(\[]?{LETTER}")
LONE_LOWER = re.compile(r"[(\[]?([a-j])[)\].]?")
EVERY = re.compile(rf"(?<![\w'’])([B-HJ-Z](?![\w'’])|[AI](?![\w'’]){NO_WORD})")
ALONE = re.compile(r"[\s*_$(\[]*[A-Z][\s*_$)\].:]*")
DENIED = re.compile(  # `B is wrong`
    r"(?<![\w'’])([A-Z])[)\]}*$:. ]*\s(?:is|was|are|must be|can be)"
    r"(?:n['’]t\b|\s+(?:not|wrong|incorrect|false|eliminated|excluded|ruled)\b)"
)
SEVERAL = re.compile(
    r"(?i:both|options?|choices?|answers?|letters?)\s+|[\s()\[\]{}*_$,;/&+]|\band\b"
)  # between letters
NEGATION = re.compile(
    r"(?i)\b(?:not|cannot|neither|nor|except|eliminat\w{1,5}|exclud\w{1,4}|rul\w{1,3} out)\b|n['’]t\b"
    r"|\b(?:all|anything|everything|any|nothing) but\b"
)


def stated_choice(text: str, letters: str = LETTERS, options: Mapping[str, str] | None = None) -> str | None:
    """Return the letter that a final text chooses; None if it chooses none, or it cannot be told which.

    Args:
        text: the final text.
        letters: of the options.
        options: text of each option by its letter, if known: an answer may be the text alone.
    """
    found = find_answer(text)
    if found is None:
        return None
    boxed = "\\boxed" in text[-MAX_CHARACTERS:]
    lower = LONE_LOWER.fullmatch(found.text)
    if lower and found.text == text.strip():
        return lower[1].upper() if lower[1].upper() in letters else None
    if found.how == "marked":
        letter = lower[1].upper() if lower else _leading(found.text, letters) or _by_text(found.text, options)
        if letter or boxed or EVERY.match(found.text):
            return letter
    bold = {letter for part in bold_parts(text) if (letter := _leading(part, letters))}
    bold -= _denied(text)
    if len(bold) == 1:
        return bold.pop()
    return _first_line(text, letters) or _by_text(found.text, options) or _only_named(text, letters)


def stated_choices(text: str, letters: str = LETTERS) -> frozenset[str] | None:
    """Return the letters that a final text chooses together (`B, A`, `A and B`, `BA`); None if it cannot be told which.

    Args:
        text: the final text.
        letters: of the options.
    """
    found, bold = find_answer(text), bold_parts(text)
    if found is None or (found.how != "marked" and len(bold) != 1 and len(text.strip().splitlines()) > 1):
        return None
    chosen = SEVERAL.sub("", plain(bold[0] if found.how != "marked" and len(bold) == 1 else found.text)).strip(".:")
    is_set = bool(chosen) and set(chosen) <= set(letters) and len(set(chosen)) == len(chosen)
    return frozenset(chosen) if is_set else None


def _leading(text: str, letters: str) -> str | None:
    """Return the letter that a text begins with, if it is a choice."""
    chosen = CHOSEN.match(plain(text[:200]).strip("*_ $\n"))
    return chosen[1] if chosen and chosen[1] in letters else None


def _first_line(text: str, letters: str) -> str | None:
    """Return the letter that a text begins with, unless a later line begins with another one in the same way."""
    lines = [line for line in text[-MAX_CHARACTERS:].splitlines() if line.strip("*_ $")]
    starts = [(letter, bool(ALONE.fullmatch(line))) for line in lines if (letter := _leading(line, letters))]
    first, denied = _leading(text, letters), _denied(text)
    if first is None or first in denied:
        return None
    alike = {letter for letter, alone in starts if alone == starts[0][1]} - denied
    return first if alike <= {first} else None


def _denied(text: str) -> set[str]:
    """Return the letters that are said to be wrong."""
    return set(DENIED.findall(text[-MAX_CHARACTERS:]))


def _only_named(text: str, letters: str) -> str | None:
    if NEGATION.search(text[-MAX_CHARACTERS:]):
        return None
    named = {letter for letter in EVERY.findall(text[-MAX_CHARACTERS:]) if letter in letters} - _denied(text)
    return named.pop() if len(named) == 1 else None


def _by_text(text: str, options: Mapping[str, str] | None) -> str | None:
    same = [letter for letter, option in (options or {}).items() if _words(option) == _words(text)]
    return same[0] if len(same) == 1 else None


def _words(text: str) -> str:
    return " ".join(plain(text).strip("*_. $").lower().split())
