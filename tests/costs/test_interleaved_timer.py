"""interleaved_timer.py: medians of known times, interleaved order, CPU time of the process."""

import time
from collections.abc import Callable

import pytest

from lit_puzzle.costs import interleaved_timer
from lit_puzzle.costs.interleaved_timer import WARM_UP_RUNS, interleaved, seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock of the process that only the work moves."""
    now = [100.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    return now


def test_medians_of_work_whose_time_varies(clock: list[float]) -> None:
    """A slow round of one piece changes neither its median nor the other piece; short work runs more often."""
    rounds_of = {"even": 0, "disturbed": 0}
    ran = {"even": 0, "disturbed": 0}

    def piece(name: str, normal: float) -> Callable[[], interleaved_timer.Work]:
        def prepare() -> interleaved_timer.Work:
            rounds_of[name] += 1
            took = normal * (50 if name == "disturbed" and rounds_of[name] == 2 else 1)

            def work() -> None:
                ran[name] += 1
                clock[0] += took

            return work

        return prepare

    assert interleaved([piece("even", 0.004), piece("disturbed", 1.0)], "cpu", 5) == pytest.approx([0.004, 1.0])
    assert rounds_of == {"even": 5, "disturbed": 5}
    assert ran == {"even": 5 * (WARM_UP_RUNS + 5) + 1, "disturbed": 5 * (WARM_UP_RUNS + 1) + 1}  # 20 ms are 5 runs


def test_rounds_begin_at_different_pieces(clock: list[float]) -> None:
    order: list[int] = []

    def piece(index: int) -> Callable[[], interleaved_timer.Work]:
        def prepare() -> interleaved_timer.Work:
            order.append(index)
            return lambda: clock.__setitem__(0, clock[0] + 1.0)

        return prepare

    interleaved([piece(index) for index in range(4)], "cpu", 2)
    assert order == [0, 1, 2, 3, 2, 3, 0, 1]


def test_time_asleep_does_not_count() -> None:
    assert seconds(lambda: time.sleep(0.2), 1, "cpu") < 0.1
    assert seconds(lambda: sum(range(3_000_000)), 2, "cpu") > 0.005


def test_zero_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        interleaved([], "cpu", 0)
