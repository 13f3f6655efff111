"""Divides a text into words, sentences and paragraphs, for checks that count them.

Reads and writes nothing. Time proportional to the text.
"""

import re

WORD = re.compile(r"\w+")  # `don't` counts as two, as IFEval counts
WHOLE_WORD = re.compile(r"\w+(?:['’-]\w+)*")
END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]*_]*+(?=\s|$)|[。！？]++|\n++")
ABBREVIATION = re.compile(
    r"\b(?:(?i:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Inc|Ltd|Co|Corp|vs|etc|approx|Fig|Eq|cf|e\.g|i\.e|a\.m|p\.m|U\.S)|[A-Z])\.$"
)
DIVIDER = re.compile(r"\s?\*\*\*\s?")


def words(text: str) -> list[str]:
    """Return the words of a text."""
    return WORD.findall(text)


def whole_words(text: str) -> list[str]:
    """Return the words of a text; one with an apostrophe or a hyphen inside is one."""
    return WHOLE_WORD.findall(text)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text: up to `.`, `!` or `?` before white space, or to the end of a line.

    A point after a title, an initial or another abbreviation ends no sentence.
    """
    found, start, last_place = [], 0, len(text.rstrip())
    for end in END.finditer(text):
        if (
            end[0] == "."
            and ABBREVIATION.search(text[max(start, end.end() - 12) : end.end()])
            and end.end() < last_place
        ):
            continue
        part = text[start : end.end()].strip()
        found += [part] if WORD.search(part) else []
        start = end.end()
    last = text[start:].strip()
    return found + ([last] if WORD.search(last) else [])


def paragraphs(text: str, divider: re.Pattern[str] = DIVIDER) -> list[str] | None:
    """Return the paragraphs between dividers; None if one inside is empty."""
    parts = [part.strip() for part in divider.split(text)]
    if len(parts) > 1 and not parts[0]:
        parts = parts[1:]
    if len(parts) > 1 and not parts[-1]:
        parts = parts[:-1]
    return parts if all(parts) else None
