r"""Grades mathematics: numbers exactly, everything else by math-verify in worker processes with a time limit.

If both the gold answer and the stated one are numbers (`number_answers`), they are compared at once; if only one of
them is, they may still be equal (`\binom{5}{2}`). Then math-verify compares expressions, sets, intervals, tuples,
matrices and equations. A gold answer that lists several without brackets (`1, 2`) has an order; where none counts,
write a set (`\{1, 2\}`). What is sent to it is limited (1,000 characters, 40 levels of brackets, balanced); what takes
longer than 5 seconds there is counted as `grader failed`. Equal text is right without any of this. Needs math-verify
(extra `graders`).

Reads and writes nothing.
"""

import re
from collections.abc import Sequence
from typing import Any

from lit_puzzle.environments.graders.final_answer import find_answer, shortened
from lit_puzzle.environments.graders.number_answers import read_number, same_number, stated_number
from lit_puzzle.environments.graders.plain_math import plain
from lit_puzzle.environments.graders.worker_pool import require_library, run_jobs
from lit_puzzle.environments.verdict import RIGHT, UNCLEAR, WRONG, Verdict, grader_failed, verdict_of

MAX_CHARACTERS = 1_000
MAX_DEPTH = 40
IN_DOLLARS = re.compile(r"\$([^$]{1,1000}+)\$|\\\(([^$]{1,1000}?)\\\)|\\\[([^$]{1,1000}?)\\\]")
LIST_AND = re.compile(r"\s*(?:\\text\{\s*and\s*\}|\band\b)\s*")
ROOT = re.compile(r"^\s*[A-Za-z](?:_\{?\w\}?)?\s*=\s*(?=\S)")  # `x_1 = 3` in a list
OUTER = (("\\{", "\\}"), ("(", ")"), ("[", "]"))
BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def read_math(value: Any, place: str) -> str:
    """Return the gold answer of a mathematical problem as text.

    Raises:
        ValueError: empty, too long or with brackets that do not close; or math-verify is missing.
    """
    gold = without_dollars(str(value))
    if read_number(gold) is None:
        require_library("symbolic", "The verification `math`")
        if why := unreadable(gold):
            raise ValueError(f"{place}: math verification cannot read the answer {str(value)[:80]!r}: {why}.")
    return gold


def grade_math(finals: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
    """Return the verdict on each text."""
    quick = [_quick(final, gold) for final, gold in zip(finals, golds, strict=True)]
    pairs = [(part, gold) for part, gold in zip(quick, golds) if not isinstance(part, Verdict)]
    in_order = [as_tuples(part, gold) for part, gold in pairs]
    jobs = [{"kind": "symbolic", "gold": gold, "answer": answer} for answer, gold in in_order]
    replies = iter(run_jobs(jobs))
    return [part if isinstance(part, Verdict) else _verdict(next(replies)) for part in quick]


def _quick(final: str, gold: str) -> Verdict | str:
    """Return the verdict if it needs no worker, else the expression that the text states."""
    right, number = read_number(gold), stated_number(final)
    if right is not None and number is not None:
        return verdict_of(same_number(number, right))
    answer = stated_expression(final)
    if answer is None:
        return Verdict(0.0, UNCLEAR)
    if _letters(answer) == _letters(gold):
        return RIGHT
    return Verdict(0.0, "wrong") if unreadable(answer) else answer


def as_tuples(answer: str, gold: str) -> tuple[str, str]:
    """Return both as tuples if the gold answer is a list without brackets, whose order counts; else both unchanged."""
    right = listed(gold)
    if len(right) < 2:
        return answer, gold
    inner = answer.replace(r"\left", "").replace(r"\right", "").strip()
    for begin, end in OUTER:
        if inner.startswith(begin) and inner.endswith(end):
            inner = inner[len(begin) : -len(end)]
            break
    return tuple("({})".format(", ".join(items)) for items in (listed(inner), right))  # type: ignore[return-value]


def listed(text: str) -> list[str]:
    """Return the parts of a text between the commas (and `and`) that stand outside of brackets."""
    depth, parts, begin = 0, list[str](), 0
    text = LIST_AND.sub(",", text)
    for place, sign in enumerate(text):
        depth += BRACKETS.get(sign, 0)
        if sign == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [ROOT.sub("", part).strip() for part in (*parts, text[begin:]) if part.strip()]


def stated_expression(final: str) -> str | None:
    """Return the expression that a final text gives as its answer; None if it cannot be told which."""
    found = find_answer(final)
    if found is None:
        return None
    if "\\boxed" in shortened(final):
        return without_dollars(found.text)
    inside = [one or two or three for one, two, three in IN_DOLLARS.findall(found.text)]
    if inside:
        return without_dollars(inside[-1]) if found.how == "text" or len(inside) == 1 else None
    one_line = len(final.strip().splitlines()) == 1 or found.how == "marked"
    return without_dollars(found.text) if one_line and len(found.text) <= MAX_CHARACTERS else None


def without_dollars(text: str) -> str:
    """Return LaTeX without the signs around it that begin mathematics, and without bold."""
    inner = text.strip().strip("*").strip().removesuffix(".").strip("$").strip()
    for begin, end in ((r"\(", r"\)"), (r"\[", r"\]")):
        if inner.startswith(begin) and inner.endswith(end):
            inner = inner[2:-2].strip()
    return inner


def unreadable(expression: str) -> str:
    """Return why an expression is not sent to math-verify, or nothing."""
    if not expression.strip() or len(expression) > MAX_CHARACTERS:
        return f"it has {len(expression):,} characters; 1 to {MAX_CHARACTERS:,} are allowed"
    if re.search(r"(?<!\\)\$|\\boxed|\\begin\{(?!.?matrix|cases|array)", expression):
        return "mathematics begins anew inside it"
    depth = braces = 0
    for place, sign in enumerate(expression):
        depth += BRACKETS.get(sign, 0)
        if sign in "{}" and expression[place - 1 : place] != "\\":
            braces += BRACKETS[sign]
        if not 0 <= braces <= MAX_DEPTH or abs(depth) > MAX_DEPTH:
            return "its brackets do not close, or nest too deeply"
    return "" if braces == 0 else "its brackets do not close"


def _letters(text: str) -> str:
    return re.sub(r"\s+", "", plain(text)).strip("$").lower() if len(text) <= MAX_CHARACTERS else ""


def _verdict(reply: dict[str, Any]) -> Verdict:
    if "failed" in reply:
        return grader_failed(f"math-verify: {reply['failed']}")
    if reply.get("unreadable") == "gold":
        return grader_failed("math-verify cannot read the gold answer")
    return WRONG if "unreadable" in reply else verdict_of(reply["correct"])
