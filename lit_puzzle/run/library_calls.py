"""Calls of libraries on what a user gave: what they raise becomes one error of the user, and they end in time.

Reads and writes nothing. Needs no torch.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def library_errors(where: object) -> Iterator[None]:
    """Turn whatever a library raises inside into one error of the user.

    Only for a call whose input is the user's file: an error of our own code inside would be called the user's, too.

    Args:
        where: the file, for the message.

    Raises:
        ValueError: with the file, the kind of error and the library's words in one line.
    """
    try:
        yield
    except Exception as error:  # tokenizers raises the bare class, transformers whatever a wrong value leads to
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} cannot be used: {type(error).__name__}: {reason[:300]}") from error


class TookTooLongError(BaseException):
    """Raised inside work that takes too long; no `except Exception` of a library catches it."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Interrupt the work inside after some seconds: a file can make it endless, as a chat template with a loop can.

    Only the main thread can be interrupted; in another one the work has no limit.

    Args:
        seconds: the limit.
        what: the work, for the message.

    Raises:
        ValueError: the limit was reached.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise TookTooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except TookTooLongError:
        raise ValueError(f"{what} took more than {seconds:g} seconds and was stopped") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
