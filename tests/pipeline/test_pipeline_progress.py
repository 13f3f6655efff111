"""Progress of a pipeline: lines, and the time left by plans and measured stages."""

import io

from rich.console import Console

from lit_puzzle.pipeline.progress import Progressing, time_text


def progressing(is_terminal: bool = False) -> tuple[Progressing, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=100, highlight=False, markup=False)
    return Progressing({"a": 10.0, "b": 20.0, "c": 30.0}, {}, console), out


def test_time_left_is_planned_times_the_ratio_of_measured_stages() -> None:
    shown, _ = progressing()
    assert shown.seconds_left() == 60
    assert shown.seconds_left("a", 4.0) == 6 + 50
    shown.measured["a"] = 20.0  # twice the plan
    assert shown.seconds_left("b", 10.0) == (40 - 10) + 60
    shown.measured |= {"b": 40.0, "c": 60.0}
    assert shown.seconds_left() == 0
    assert shown.seconds_left("c", 100.0) == 0


def test_a_bar_is_shown_in_a_terminal_only() -> None:
    for is_terminal in (False, True):
        shown, out = progressing(is_terminal)
        with shown.shown():
            shown.line("[1/3] a: starts")
            shown.tick("a", 3.0)
        assert "[1/3] a: starts" in out.getvalue()
        assert ("left" in out.getvalue()) is is_terminal


def test_times_are_short() -> None:
    assert (time_text(7.4), time_text(89.0), time_text(150.0)) == ("7 s", "89 s", "2.5 min")
