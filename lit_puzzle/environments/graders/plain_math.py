r"""Writes mathematics of LaTeX, Markdown and Unicode in one plain form, which the readers of answers share.

What is only layout goes (`$`, `\left`, `\,`, `\displaystyle`), what has two spellings gets one (`\dfrac` is `\frac`,
`−` is `-`, `×` and `\cdot` are `*`, `²` is `^2`), and text inside mathematics stands free (`25\text{ cm}` is `25 cm`).

Reads and writes nothing. Every step takes time proportional to the text.
"""

import re

LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|bigl?|bigr|Bigl?|Bigr|quad|qquad)(?![A-Za-z])|\\[,;:!> ]|\\[()\[\]]|~"
)
TEXT = re.compile(r"\\(?:text|mathrm|textbf|textit|textrm|mathbf|mathit|operatorname|mbox|bf|rm)\s*\{([^{}]*)\}")
SPELLINGS = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:%|percent(?![A-Za-z]))"), "%"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])"), " degrees "),
)
SIGNS = str.maketrans(
    {"−": "-", "–": "-", "‐": "-", "‑": "-", "＋": "+", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/"}
    | {"⁄": "/", "％": "%", "°": " degrees ", "，": ",", "．": ".", "（": "(", "）": ")"}
    | {"\u202f": "\u00a0", "\u2009": "\u00a0", "\u2007": "\u00a0", "\u200b": "", "\u2060": "", "\ufeff": ""}
    | dict.fromkeys("\u200e\u200f\u202a\u202b\u202c\u2066\u2067\u2068\u2069", "")  # marks of direction
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
SUPERSCRIPTS = re.compile("[⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8"}


def plain(text: str) -> str:
    """Return a piece of mathematics in the plain form; `{` and `}` of LaTeX arguments stay."""
    for sign, fraction in VULGAR.items():
        text = text.replace(sign, f" {fraction} ")
    text = SUPERSCRIPTS.sub(lambda found: "^{" + found[0].translate(RAISED) + "}", text.translate(SIGNS))
    for pattern, one in SPELLINGS:
        text = pattern.sub(one, text)
    text = TEXT.sub(r" \1 ", TEXT.sub(r" \1 ", text))  # twice: \textbf{\text{...}}
    text = re.sub(r"(?<=\w) ++\^", "^", text)
    # A thin space in LaTeX is what groups digits: 1\,234. Others only separate.
    text = re.sub(r"(?<=\d)\\[,;](?=\d{3})", "\u00a0", text)
    return LAYOUT.sub(" ", text).strip()
