"""Render the ```math fences of docs/ as MathML, which browsers draw without a script, a font or the network.

zensical.toml names `mathml` as the formatter of these fences; GitHub renders the same fences itself.
Reads and writes nothing.
"""

from typing import Any

from latex2mathml.converter import convert


def mathml(source: str, *_: Any, **__: Any) -> str:
    """Return the MathML of a fence; every non-empty line is a formula of its own."""
    formulas = [convert(line, display="block") for line in source.splitlines() if line.strip()]
    return f'<div class="math">{"".join(formulas)}</div>'
