r"""Text from files as text for a terminal: nothing in it can move the cursor, change colors or hide characters.

Control and format characters (escape sequences, carriage returns, direction marks, zero-width characters), separators
other than blank and line break, and lone surrogates appear as Python escapes: `\x1b`, `\u202e`. Reads nothing; writes
to the standard output.
"""

import sys
from contextlib import suppress

SHOWN_CHARACTERS = 600  # of a text that is cut
SHOWN_LINES = 16
LEFT_OUT = "[... {count:,} characters left out; --full shows all ...]"


def escaped(text: str, line_breaks: bool = False) -> str:
    """Return a text in which every character that a terminal may obey is a Python escape.

    Args:
        text: any text.
        line_breaks: whether line breaks stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or (line_breaks and character == "\n")
        else character.encode("unicode_escape").decode()
        for character in text
    )


def cut(text: str) -> str:
    """Return a text without its middle if it is long; what was left out is counted.

    The end of a completion holds its answer, and that of a prompt its question, so that most of what stays is there.
    """
    head = _first(text, SHOWN_CHARACTERS // 3, SHOWN_LINES // 4)
    rest = text[len(head) :]
    tail = _first(rest[::-1], SHOWN_CHARACTERS - SHOWN_CHARACTERS // 3, SHOWN_LINES - SHOWN_LINES // 4)[::-1]
    count = len(rest) - len(tail)
    note = LEFT_OUT.format(count=count)
    return text if count <= len(note) and text.count("\n") < 2 * SHOWN_LINES else f"{head}{note}{tail}"


def _first(text: str, characters: int, lines: int) -> str:
    """Return the beginning of a text, limited in characters and in line breaks."""
    return "\n".join(text[:characters].split("\n")[: lines + 1])


def indented(label: str, text: str, full: bool) -> list[str]:
    """Return a labelled text as lines, escaped, and cut unless it is to be shown in full.

    Args:
        label: what it is; stands before the first line.
        text: the text.
        full: whether long texts are shown whole.
    """
    first, *others = escaped(text if full else cut(text), line_breaks=True).split("\n")
    return [f"    {label:<11} {first}", *(f"{'':16}{line}" for line in others)]


def print_lines(lines: list[str]) -> None:
    """Print lines; characters that the output's encoding lacks are escaped, and a closed pipe ends the printing."""
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join(escaped(line) for line in lines).encode(encoding, "backslashreplace").decode(encoding)
    with suppress(BrokenPipeError):  # `| head`
        print(text, flush=True)
