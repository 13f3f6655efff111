"""Commands that README and docs show, as words; loops are unrolled, continued lines and open quotations joined."""

import re
import shlex

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
LOOP = re.compile(r"for (\w+) in ([^;]+); do (.+); done(?: *#.*)?")


def shown_commands(page: str) -> list[list[str]]:
    """Return every command of a page's bash and unmarked fences, in order, as a shell would split it."""
    blocks = [text for language, text in FENCE.findall(page) if language in ("", "bash")]
    return [words for block in blocks for words in commands_in(block)]


def commands_in(block: str) -> list[list[str]]:
    """Return every command of one block."""
    return [words for line in logical_lines(block) for words in split(line)]


def logical_lines(block: str) -> list[str]:
    """Return the lines of a block; a line that ends inside a quotation is joined with the next."""
    lines: list[str] = []
    open_line = ""
    for line in block.replace("\\\n", " ").splitlines():
        open_line = f"{open_line}\n{line}".strip()
        try:
            shlex.split(open_line, comments=True)
        except ValueError:  # no closing quotation yet
            continue
        lines.append(open_line)
        open_line = ""
    assert not open_line, f"a quotation is never closed: {open_line}"
    return lines


def split(line: str) -> list[list[str]]:
    """Return the commands of one line: the turns of a loop, and both sides of `&&`."""
    loop = LOOP.fullmatch(line)
    if loop:
        return [words for value in loop[2].split() for words in split(loop[3].replace(f"${loop[1]}", value))]
    commands: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    return [words for words in commands if words]
