"""SIGTERM and SIGINT: one line and exit code 128 + number, at once or after the running update."""

import os
import signal
import threading
import time

import pytest

from lit_puzzle.run import signals
from lit_puzzle.run.signals import StoppedError, defer_signals, noted_signal, stopped_by_signals


def stop_inside(number: int) -> None:
    with stopped_by_signals("; go on."):
        signal.raise_signal(number)
        time.sleep(60)


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")])
def test_a_command_ends_with_one_line(number: int, code: int, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        stop_inside(number)
    assert stopped.value.code == code
    assert capsys.readouterr().err == f"stopped by {name}; go on.\n"
    assert signal.getsignal(number) == before


def test_a_deferred_signal_is_noted_and_a_second_one_stops() -> None:
    def inside() -> None:
        with stopped_by_signals("; go on."):
            defer_signals(True)
            signal.raise_signal(signal.SIGTERM)
            assert noted_signal() == signal.SIGTERM
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the second signal was ignored")

    with pytest.raises(SystemExit, match="143"):
        inside()
    assert noted_signal() is None


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.1)

    def inside() -> None:
        with stopped_by_signals("; go on."):
            defer_signals(True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    begin = time.monotonic()
    with pytest.raises(SystemExit, match="130"):
        inside()
    assert time.monotonic() - begin < 30


def test_patience_ends_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.2)
    sent: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: sent.append(number))
    try:
        with stopped_by_signals("; go on."):
            defer_signals(True)
            signal.raise_signal(signal.SIGTERM)
        time.sleep(0.5)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sent == []


def test_libraries_that_catch_everything_do_not_catch_it() -> None:
    assert not issubclass(StoppedError, Exception)


def test_other_threads_leave_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work() -> None:
        with stopped_by_signals("; go on."):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
