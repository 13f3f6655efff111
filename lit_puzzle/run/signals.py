"""SIGTERM and SIGINT: what is finished stays, the command ends with one line and exit code 128 + number.

A signal raises `StoppedError` in the main thread, so that half-written files are removed and the lock is released; the
same command continues the run. Training that can save its state after the running update defers this: the first signal
is noted, and `StoppedError` is raised after the update, or after `PATIENCE_SECONDS`, or by a second signal. Reads and
writes nothing; needs no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE_SECONDS = 20.0  # schedulers kill 30 seconds or more after SIGTERM


class StoppedError(BaseException):
    """A signal has stopped the command; no `except Exception` of a library catches it.

    Attributes:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    """What this process knows of signals."""

    deferring = False
    noted: int | None = None
    timer: threading.Timer | None = None  # ends the patience after a noted signal
    forward: Callable[[int], object] | None = None


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.forward is not None:
        _State.forward(number)
    if not _State.deferring or _State.noted is not None:
        raise StoppedError(number)
    _State.noted = number
    _State.timer = threading.Timer(PATIENCE_SECONDS, os.kill, (os.getpid(), number))
    _State.timer.daemon = True
    _State.timer.start()


def install_handlers(forward: Callable[[int], object] | None = None) -> None:
    """Install the handlers, in the main thread; libraries may have installed theirs meanwhile.

    Args:
        forward: passes a signal on to the processes that this one has started.
    """
    _State.forward = forward
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _handle)


@contextmanager
def stopped_by_signals(hint: str) -> Iterator[None]:
    """End the command inside with one line and exit code 128 + number when it is stopped by a signal.

    Args:
        hint: end of the line, which says what to do next.

    Raises:
        SystemExit: a signal has stopped it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    install_handlers()
    try:
        yield
    except StoppedError as stopped:
        print(f"stopped by {stopped}{hint}", file=sys.stderr, flush=True)
        raise SystemExit(128 + stopped.number) from None
    finally:
        if _State.timer is not None:
            _State.timer.cancel()
        _State.deferring, _State.noted, _State.timer, _State.forward = False, None, None, None
        for number, handler in before.items():
            signal.signal(number, handler)


def defer_signals(on: bool) -> None:
    """Note a first signal from now on instead of raising, or end this."""
    _State.deferring = on


def noted_signal() -> int | None:
    """Return the number of a signal that was deferred, or None."""
    return _State.noted
