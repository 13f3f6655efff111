"""Distinguishes errors of the user (one line, exit code 2) from errors of libraries (a traceback).

A ValueError is the user's if it was raised by this package, which validates its input, or by code of the user: the
package of the stage that a recipe names, packages that its class paths name and that are not installed distributions,
modules of the current folder, and the main script. All other code is a library, wherever it is: in site-packages or
dist-packages of the system or the user, in a folder of PYTHONPATH, in a zip file. Reads and writes nothing.
"""

import sys
import sysconfig
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType

PACKAGE = __name__.partition(".")[0]
KNOWN = frozenset({PACKAGE, "lightning", "torch", "transformers", ""})  # installed packages that recipes name
SHOWN_CHARACTERS = 4000  # of a message
UNION_RAISER = "raise_union_unexpected_value"  # of jsonargparse
INSTALLED = ("site-packages", "dist-packages")


@contextmanager
def one_line_errors(stage_package: str | None = None, class_packages: Collection[str] = ()) -> Iterator[None]:
    """Print a ValueError of the user raised inside as one message and leave with exit code 2.

    Args:
        stage_package: top-level package of the stage function.
        class_packages: top-level packages of classes that a recipe names.

    Raises:
        SystemExit: an error of the user (code 2); errors of libraries pass through.
    """
    try:
        yield
    except ValueError as error:
        asked = (set(class_packages) - KNOWN) & {_module(frame).partition(".")[0] for _, frame in _raised(error)}
        installed = metadata.packages_distributions() if asked else KNOWN  # it takes 0.3 seconds
        cause = users_error(error, {stage_package, "__main__"} | {name for name in asked if name not in installed})
        if cause is None:
            raise
        print(f"error: {printable(str(cause))}", file=sys.stderr)
        raise SystemExit(2) from None


def raised_by_this_package(error: BaseException) -> bool:
    """Return whether the code that raised an error is this package's."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and _module(frames[-1]).partition(".")[0] == PACKAGE


def printable(message: str) -> str:
    """Return a message without what a terminal would obey, and without its middle if it is long.

    Names and values in it come from files: a tensor can be called by an escape sequence, or by a megabyte.
    """
    text = "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in message
    )
    left_out = len(text) - SHOWN_CHARACTERS
    if left_out <= 0:
        return text
    head = SHOWN_CHARACTERS * 3 // 4
    return f"{text[:head]} [... {left_out:,} characters ...] {text[head + left_out :]}"


def users_error(error: BaseException | None, brought: Collection[str | None]) -> BaseException | None:
    """Return the ValueError that is the user's among an error and those that it wraps, the outermost first, or None.

    Args:
        error: the exception that was raised.
        brought: top-level packages of the user.
    """
    for cause, frame in _raised(error):
        if _is_users(_module(frame), Path(frame.f_code.co_filename), brought):
            return cause
    return None


def _raised(error: BaseException | None) -> Iterator[tuple[ValueError, FrameType]]:
    """Yield every ValueError among an error and those that it wraps, with the frame that raised it.

    Of a value that fits no type of a union, jsonargparse wraps the first type's error only; all are in its frame.
    """
    while error is not None:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, ValueError) and frames:
            yield error, frames[-1]
            if frames[-1].f_code.co_name == UNION_RAISER:
                for branch in frames[-1].f_locals["exceptions"]:
                    yield from _raised(branch)
        error = error.__cause__ or error.__context__


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_users(module: str, file: Path, brought: Collection[str | None]) -> bool:
    """Return whether a module is this package's or the user's."""
    top = module.partition(".")[0]
    if top == PACKAGE:
        return True
    if file.is_relative_to(sysconfig.get_path("stdlib")) or not set(file.parts).isdisjoint(INSTALLED):
        return False
    # a.b lies in ROOT/a/b.py, a in ROOT/a.py or ROOT/a/__init__.py
    depth = module.count(".") + (file.name == "__init__.py")
    return top in brought or (file.is_file() and file.resolve().parents[depth] == Path.cwd())
