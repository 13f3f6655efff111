"""Calls of libraries on what a user gave: what they raise becomes one error of the user.

Reads and writes nothing. Needs no torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from lit_puzzle.run.user_errors import raised_by_this_package

OWN_MISTAKES = (TypeError, AttributeError, NameError, LookupError, AssertionError, ImportError)
PANIC = "PanicException"  # of pyo3
SHOWN = 300  # characters of a library's words


@contextmanager
def library_errors(where: object) -> Iterator[None]:
    """Turn whatever a library raises inside into one error of the user.

    Only for a call whose input is the user's file. Which exceptions a library raises on one cannot be listed:
    tokenizers raises the bare class, transformers whatever a wrong value leads to (TypeError, AttributeError, KeyError,
    AssertionError, RuntimeError), huggingface_hub a class of its own, and Rust code one that is no Exception and cannot
    be imported (of tokenizers, where a regular expression of the file backtracks without end). A mistake in this
    package's own code is none of the user's: `OWN_MISTAKES` that are raised there pass through with their traceback.

    Args:
        where: the file, for the message.

    Raises:
        ValueError: with the file, the kind of error and the library's words in one line.
    """
    try:
        yield
    except BaseException as error:
        stops = not isinstance(error, Exception) and type(error).__name__ != PANIC
        if stops or (isinstance(error, OWN_MISTAKES) and raised_by_this_package(error)):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} cannot be used: {type(error).__name__}: {reason[:SHOWN]}") from error
