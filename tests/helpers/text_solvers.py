"""Independent solvers of the long-context texts: they read the prompt as a person would and share no code with it."""

import re
from collections import Counter


def solve(text: str) -> list[str]:
    """The answer, as a list of numbers or words, from a problem's text alone."""
    *body, question = text.split("\n")
    if "notes on" in question or "note on" in question:
        keys = re.findall(r"[a-z]+-[a-z]+-\d{3}", question)
        return [number for key in keys for number in _notes_on(key, body)]
    if question.startswith("What is the value of "):
        return [_follow(question.removeprefix("What is the value of ").split("?")[0], body)]
    if question.startswith("How many crates hold "):
        good = question.removeprefix("How many crates hold ").split("?")[0]
        return [str(sum(line.startswith("Crate ") and line.endswith(f" holds {good}.") for line in body))]
    rows = body[1:-1]
    (first, count), (_, second) = Counter(" ".join(rows).split()).most_common(2)
    assert count > second
    return [first]


def _notes_on(key: str, body: list[str]) -> list[str]:
    head = f"The note on {key} says "
    return [line.removeprefix(head).rstrip(".") for line in body if line.startswith(head)]


def _follow(variable: str, body: list[str]) -> str:
    (line,) = [line for line in body if line.startswith(f"The value of {variable} is ")]
    value = line.removeprefix(f"The value of {variable} is ").rstrip(".")
    return _follow(value.removeprefix("that of "), body) if value.startswith("that of ") else value
