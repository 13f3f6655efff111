"""A reader that has seen enough (`| head`) closes the pipe: a command that only prints then ends without a traceback.

Writes to standard output only. Source: Python's documentation of the signal module, "Note on SIGPIPE". Needs no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

PRINTING = ("--plan", "--help", "-h", "--print_config")  # words of `lightning run` that start nothing


def only_prints(words: Sequence[str]) -> bool:
    """Return whether a command line prints and starts nothing; a run that loses its reader is to fail as before."""
    return words[:1] != ["run"] or any(word in PRINTING or ".help" in word.partition("=")[0] for word in words)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """End with exit code 1, as Python does, and without a traceback where nobody reads standard output any more.

    Raises:
        SystemExit: the reader is gone (code 1).
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, not when Python ends: nobody could handle the error then
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        raise SystemExit(1) from None
