"""Compares texts that have to be equal, up to form: white space, a code block or bold around the whole, a last point.

Reads and writes nothing. Time proportional to the text.
"""


def without_fence(text: str) -> str:
    """Return what stands in a code block, if a text is one code block and nothing else."""
    inner = text.strip()
    if not (inner.startswith("```") and inner.endswith("```") and len(inner) > 6):
        return inner
    language, line_end, rest = inner[3:-3].partition("\n")
    if "```" in rest or (line_end and not language.strip().isalnum() and language.strip()):
        return inner
    return (rest if line_end else language).strip()


def same_text(final: str, gold: str) -> bool:
    """Return whether a final text is the gold answer."""
    return _normal(final) == _normal(gold)


def _normal(text: str) -> list[str]:
    plain = without_fence(text)
    if plain.startswith("**") and plain.endswith("**") and plain.count("**") == 2:
        plain = plain[2:-2].strip()
    words = plain.removesuffix(".").split()
    return words or plain.split()
