"""Counts the changes of a folder that this process is about to make, and ends it before a chosen one.

Python announces file operations to audit hooks before they happen. Counted: files opened for writing, renamed, removed
and linked, folders made and removed, all under one folder. Writers in C++ that open files by themselves (none of the
project's own: its safetensors, Parquet and checkpoint files go through Python's `open`) are not seen here; a limit on
file sizes ends those in the middle of a write (`faults.server.limit_files`).
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch(folder: Path, kill_before: int | None) -> list[str]:
    """Return a list that grows by each change under a folder; the process is killed before the given one.

    Args:
        folder: whose files are watched; absolute.
        kill_before: number of the change, from 1; None: none.
    """
    changes: list[str] = []
    inside = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal inside
        if inside or not (event in CHANGES or (event == "open" and is_writing(arguments))):
            return
        inside = True  # what this hook does itself is not counted
        path = arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]
        if isinstance(path, str | bytes | os.PathLike) and (Path.cwd() / os.fsdecode(path)).is_relative_to(folder):
            changes.append(f"{event} {(Path.cwd() / os.fsdecode(path)).relative_to(folder)}")
            if len(changes) == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
        inside = False

    sys.addaudithook(hook)
    return changes


def is_writing(arguments: tuple[Any, ...]) -> bool:
    """Return whether the arguments of an `open` event are those of a file that is opened for writing."""
    _, mode, flags = arguments
    return bool(flags & WRITING) if isinstance(flags, int) else any(letter in str(mode) for letter in "wax+")
