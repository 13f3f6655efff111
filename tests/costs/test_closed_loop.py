"""Latencies in a closed loop: by hand, and what it must do when load grows."""

import dataclasses
import math

import pytest

from lit_puzzle.costs import closed_loop as module
from lit_puzzle.costs.closed_loop import FrontEnd, StepTimes, closed_loop

NONE = FrontEnd(0.0, 0.0)
TIMES = StepTimes(decode=lambda sequences: 1.0, read=lambda tokens: 0.1 * tokens, chunk_tokens=100, sequences=50)


def first(prompts: list[int], generated: list[int], clients: int, times: StepTimes, front: FrontEnd) -> float:
    return closed_loop(prompts, generated, clients, times, front).first_token


def test_alone_it_is_the_way_to_the_engine_and_the_prompt() -> None:
    front = FrontEnd(0.5, 0.01)
    assert first([20], [1], 1, TIMES, front) == pytest.approx(0.5 + 0.2 + 2.0)
    # a second request of one client finds the engine idle again
    assert first([20, 20], [3, 3], 1, TIMES, front) == pytest.approx(2.7)


def test_a_prompt_longer_than_a_step_is_read_in_chunks() -> None:
    assert first([250], [1], 1, TIMES, NONE) == pytest.approx(25.0)


def test_prompts_that_arrive_together_share_a_step_and_wait_for_it() -> None:
    # 60 + 40 of the second prompt in the first step (10 s); 20 left in the second, beside one that decodes
    assert first([60, 60], [9, 9], 2, TIMES, NONE) == pytest.approx((10 + 13) / 2)


def test_a_prompt_waits_for_the_running_step_and_for_the_scheduled_one() -> None:
    # Both start at 0: first tokens after 2 s. The first ends a step later, at 3 s, and its client sends the third
    # request. The step then running was scheduled at 2 s: the prompt is read in the one after it, 4 .. 6 s.
    times = [first([10, 10, 10][:count], [2, 9, 1][:count], 2, TIMES, NONE) for count in (2, 3)]
    assert times[0] == pytest.approx(2.0)
    assert 3 * times[1] - 2 * times[0] == pytest.approx(1.0 + 1.0 + 1.0)


def test_what_the_engine_does_not_hold_waits_outside() -> None:
    # Two clients, room for one: the second prompt is read when the first request has its last token, at 5 s.
    one = dataclasses.replace(TIMES, sequences=1)
    assert first([10, 10], [5, 5], 2, one, NONE) == pytest.approx((1 + 6) / 2)
    assert first([10, 10], [5, 5], 2, TIMES, NONE) == pytest.approx(2.0)


def test_between_tokens_are_steps_and_the_prompts_read_in_them() -> None:
    # 10 and 20 tokens are read at 0 .. 3 s. The first request ends at 4 s; its client's next prompt is read at 5 .. 8
    # beside the second request, whose tokens come at 3, 4, 5 and 8 s. The third decodes one token more, alone.
    found = closed_loop([10, 20, 20], [2, 4, 2], 2, TIMES, NONE)
    assert found.first_token == pytest.approx((3 + 3 + 4) / 3)
    assert found.output_token == pytest.approx((1 + 5 / 3 + 1) / 3)
    assert closed_loop([10], [1], 1, TIMES, NONE).output_token == 0.0


def test_it_grows_with_load_and_is_never_below_the_idle_engine() -> None:
    lengths = [20 + index % 7 for index in range(80)], [30 + index % 5 for index in range(80)]
    idle = first(*lengths, 1, TIMES, NONE)
    loaded = [first(*lengths, clients, TIMES, NONE) for clients in (2, 4, 8, 16)]
    assert idle < loaded[0] and loaded == sorted(loaded)


def test_equal_steps_taken_at_once_are_those_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, front = ([20, 30, 25, 22, 28, 21], [400, 150, 90, 80, 333, 7]), FrontEnd(0.3, 0.0)
    calls = 0

    def decode(sequences: int) -> float:
        nonlocal calls
        calls += 1
        return 1.0

    at_once = first(*lengths, 3, StepTimes(decode, TIMES.read, 100, 50), front)
    assert calls < 60
    monkeypatch.setattr(module._Loop, "skip", lambda loop, seconds: 1)
    assert at_once == pytest.approx(first(*lengths, 3, TIMES, front))


def test_refuses() -> None:
    with pytest.raises(ValueError, match="as many prompts"):
        closed_loop([], [], 1, TIMES)
    with pytest.raises(ValueError, match="all lengths and clients at least 1"):
        closed_loop([10], [math.nan], 1, TIMES)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="room for prompts beside them"):
        closed_loop([1], [1], 1, dataclasses.replace(TIMES, sequences=100))
    for seconds in (math.nan, math.inf, 0.0):
        with pytest.raises(ValueError, match="1 sequences and 0 prompt tokens takes"):
            closed_loop([10, 10], [5, 5], 1, dataclasses.replace(TIMES, decode={1: seconds}.__getitem__))
    with pytest.raises(ValueError, match="token_seconds"):
        FrontEnd(0.1, -1.0)
