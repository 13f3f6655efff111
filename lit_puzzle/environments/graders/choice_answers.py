r"""Reads which option a final text chooses: a letter, with or without explanation, or the text of an option.

Looked at in this order: a box, what is said to be the answer, what is bold, the beginning of the text, and the only
letter that is named. `A` and `I` are also English words: they count only where they cannot be one. A text that names
several letters and points to none chooses nothing.

Reads and writes nothing. Time proportional to the text.
"""

import re
from collections.abc import Mapping

from lit_puzzle.environments.graders.final_answer import MAX_CHARACTERS, bold_parts, find_answer
from lit_puzzle.environments.graders.plain_math import plain

LETTERS = "ABCDEFGHIJ"
NO_WORD = r"(?!\s+(?!(?:and|or|because|since|as|not|but|is)\b)[a-z]|['’][a-z])"  # not `A cell`, `I think`, `I'm`
NO_OTHER = r"(?!\s*(?:,|/|&|\bor\b|\band\b)\s*[(\[]?[A-Z]\b)"  # not `A or B`
LETTER = rf"([B-HJ-Z](?![\w'’])|[AI](?![\w'’]){NO_WORD}){NO_OTHER}"
CHOSEN = re.compile(rf"(?:(?i:option|choice|answer|letter)\s*)?[(\[]?{LETTER}")
LONE_LOWER = re.compile(r"[(\[]?([a-j])[)\].]?")
EVERY = re.compile(rf"(?<![\w'’])([B-HJ-Z](?![\w'’])|[AI](?![\w'’]){NO_WORD})")


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
    if found.how == "marked":
        lower = LONE_LOWER.fullmatch(found.text)
        letter = lower[1].upper() if lower else _leading(found.text, letters) or _by_text(found.text, options)
        if letter or boxed or EVERY.match(found.text):
            return letter
    bold = {letter for part in bold_parts(text) if (letter := _leading(part, letters))}
    if len(bold) == 1:
        return bold.pop()
    return _leading(text, letters) or _by_text(found.text, options) or _only_named(text, letters)


def _leading(text: str, letters: str) -> str | None:
    """Return the letter that a text begins with, if it is a choice."""
    chosen = CHOSEN.match(plain(text[:200]).strip("*_ $\n"))
    return chosen[1] if chosen and chosen[1] in letters else None


def _only_named(text: str, letters: str) -> str | None:
    named = {letter for letter in EVERY.findall(text[-MAX_CHARACTERS:]) if letter in letters}
    return named.pop() if len(named) == 1 else None


def _by_text(text: str, options: Mapping[str, str] | None) -> str | None:
    same = [letter for letter, option in (options or {}).items() if _words(option) == _words(text)]
    return same[0] if len(same) == 1 else None


def _words(text: str) -> str:
    return " ".join(plain(text).strip("*_. $").lower().split())
