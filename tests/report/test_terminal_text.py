"""Text for a terminal: nothing in it is obeyed, nothing hidden, and what is left out is counted."""

import io
import re
import sys

import pytest

from lit_puzzle.report.terminal_text import SHOWN_CHARACTERS, SHOWN_LINES, cut, escaped, indented, print_lines

HOSTILE = [
    chr(code) for code in (*range(32), *range(0x7F, 0xA0), 0x200B, 0x202E, 0x2028, 0x2066, 0xFEFF, 0xD800, 0xE0001)
]


@pytest.mark.parametrize("character", HOSTILE, ids=ascii)
def test_characters_that_a_terminal_obeys_or_hides_are_escapes(character: str) -> None:
    shown = escaped(f"a{character}b")
    assert shown.isprintable() and shown.startswith("a\\") and shown.endswith("b")
    assert shown.encode().decode("unicode_escape") == f"a{character}b"


def test_other_text_stays_as_it_is() -> None:
    assert escaped("größer ≥ 7, 数学 \\frac{1}{2}") == "größer ≥ 7, 数学 \\frac{1}{2}"
    assert escaped("one\ntwo\r", line_breaks=True) == "one\ntwo\\r"


@pytest.mark.parametrize("length", [SHOWN_CHARACTERS + 200, 5_000, 1_000_000])
def test_a_long_text_loses_its_middle_and_says_how_much(length: int) -> None:
    text = "".join(chr(97 + index % 26) for index in range(length))
    found = re.fullmatch(r"(\w+)\[\.\.\. ([\d,]+) characters left out; --full shows all \.\.\.\](\w+)", cut(text))
    assert found is not None
    head, count, tail = found.groups()
    assert text.startswith(head) and text.endswith(tail)
    assert len(head) + int(count.replace(",", "")) + len(tail) == length
    assert len(head) + len(tail) <= SHOWN_CHARACTERS < 2 * len(tail)


def test_a_text_of_many_lines_is_cut_by_lines() -> None:
    shown = cut("\n" * 500 + "answer")
    assert shown.count("\n") <= SHOWN_LINES + 2 and shown.endswith("\nanswer")
    assert int(re.findall(r"(\d+) characters", shown)[0]) == 506 - len(re.sub(r"\[.*\]", "", shown))


def test_short_texts_are_whole() -> None:
    for text in ("", "a", "x" * SHOWN_CHARACTERS, "one\ntwo\nthree"):
        assert cut(text) == text


def test_lines_of_a_text_stand_below_each_other() -> None:
    lines = indented("prompt", "one\ntwo\x1b[2J", full=False)
    assert lines == ["    prompt      one", "                two\\x1b[2J"]
    whole = indented("prompt", "x" * 5000, full=True)
    assert whole == [f"    prompt      {'x' * 5000}"]


def test_an_output_without_a_character_gets_an_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    print_lines(["0.5 ± 0.1", "recipe\x1b[31m"])
    assert output.buffer.getvalue() == b"0.5 \\xb1 0.1\nrecipe\\x1b[31m\n"
