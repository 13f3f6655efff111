"""Calls of libraries on what a user gave: what they raise becomes one error of the user.

Reads and writes nothing. Needs no torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager


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
