r"""Finds where the answer stands in a final text, and says when it cannot be told.

In this order: the last `\boxed{...}`; `#### ...`; what follows "answer is", "answer:" or "answer =" (the last such
place); what the last line says after its last `=`; else the whole text if it is one line. A box that is not closed is
no answer: nothing is taken from elsewhere instead. Two different boxes with nothing but
`or`, `and` or a comma between them are none either.

Reads and writes nothing. Only the last 20,000 characters are looked at; time proportional to them.
"""

import re
from dataclasses import dataclass
from typing import Literal

MAX_CHARACTERS = 20_000
MAX_ANSWER = 2_000  # characters of one answer
STATED = re.compile(r"(?i)\banswers?\b(?:[^\n.:=]{0,60}?(?<!\w)(?:is|are|be)(?!\w)|[^\n.:=]{0,60}?[:=])[*_: ]*")
OTHER_BOX = re.compile(  # `\boxed{1} or`, at the end
    r"\\f?box(?:ed)?\{([^{}]*+)\}[\s$*]*+(?:,|(?:\\text\{)?\s*+(?:or|and)(?![A-Za-z]))[\s}$*]*$"
)
BLANKS = re.compile(r"[ \t]{2,}+")
HASHES = re.compile(r"(?m)^#### *(.+)$")
BOLD = re.compile(r"(?<![\w)*])\*\*([^*\n]{1,200}+)\*\*(?![\w(*])")
SENTENCE_END = re.compile(r"(?<=[^\s.])\.(?=\s|$)|;(?=\s)")


@dataclass(frozen=True)
class Found:
    """An answer as it stands in a text.

    Attributes:
        text: the answer.
        how: `marked` (a box, or said to be the answer), `bold`, or `text` (the last line, nothing points to it).
    """

    text: str
    how: Literal["marked", "bold", "text"]


def find_answer(text: str) -> Found | None:
    """Return the answer of a final text; None if it cannot be told where it stands."""
    text = shortened(text)
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start >= 0:
        inside = _braced(text, text.find("{", start, start + 12))
        other = OTHER_BOX.search(text[max(0, start - MAX_ANSWER) : start])
        hedged = other is not None and inside is not None and other[1].strip() != inside.strip()
        return None if inside is None or hedged else Found(inside.strip(), "marked")
    hashes = HASHES.findall(text)
    if hashes:
        return Found(hashes[-1].strip(), "marked")
    for found in reversed(list(STATED.finditer(text))):
        answer = _sentence(text[found.end() :])
        if answer:
            return Found(answer, "marked")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return Found(lines[-1][-MAX_ANSWER:], "text") if lines else None


def shortened(text: str) -> str:
    """Return the end of a text, runs of blanks as one blank."""
    return BLANKS.sub(" ", text)[-MAX_CHARACTERS:].strip()


def bold_parts(text: str) -> list[str]:
    """Return what is bold in a text (`**...**`), in its order."""
    return [part.strip() for part in BOLD.findall(shortened(text))]


def _braced(text: str, place: int) -> str | None:
    """Return what stands between the brace at a place and the one that closes it."""
    if place < 0:
        return None
    depth = 0
    for end in range(place, min(len(text), place + MAX_ANSWER)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[place + 1 : end]
    return None


def _sentence(text: str) -> str:
    """Return the beginning of a text up to the end of its first sentence or line, without Markdown around it."""
    line = next((line for line in text[:MAX_ANSWER].splitlines() if line.strip(" *_:$")), "")
    return SENTENCE_END.split(line.strip(), maxsplit=1)[0].strip(" *_:")
