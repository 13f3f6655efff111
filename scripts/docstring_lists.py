"""Keep the lines of module docstrings apart on the API pages: a griffe extension, named in zensical.toml.

Docstrings say what a module costs in lines such as `Memory: ...` and `Disk: ...`, which Markdown would run
together into one paragraph. Those indented by two spaces become a list, all others paragraphs, and formulas are set
off from the text above them. Reads and writes nothing.
"""

import re
from typing import Any

import griffe

NAMES = "Reads|Writes|Memory|Disk|Traffic|Time|Work|Source|Results|Shapes|Shape legend|Legend|Symbols"
ENTRY = re.compile(rf"^ {{2}}(?=(?:{NAMES})\b[^.]*:)")
PARAGRAPH = re.compile(rf"^(?:{NAMES})\b[^.]*:")


def apart(text: str) -> str:
    """Return the text with every named line as an entry of a list or a paragraph of its own."""
    lines: list[str] = []
    in_entry = False
    for line in text.splitlines():
        if ENTRY.match(line):
            lines += [*([] if in_entry else [""]), f"- {line.strip()}"]
            in_entry = True
        elif in_entry and line.startswith("    "):
            lines.append(f"  {line.strip()}".replace("  + ", r"  \+ ", 1))  # a plus would begin a list in the list
        else:
            formula = line.startswith("    ") and bool(lines) and lines[-1].strip() and not lines[-1].startswith("    ")
            lines += ["", line] if in_entry or formula or PARAGRAPH.match(line) else [line]
            in_entry = False
    return "\n".join(lines)


class DocstringLists(griffe.Extension):
    """Apply `apart` to the docstring of every module."""

    def on_module(self, *, mod: griffe.Module, **_: Any) -> None:
        """Rewrite one module's docstring, in memory."""
        if mod.docstring is not None:
            mod.docstring.value = apart(mod.docstring.value)
