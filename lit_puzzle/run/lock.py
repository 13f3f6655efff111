"""One process at a time works in a run folder: a lock that ends with its process.

Writes `.lit_puzzle_lock` into the run folder: host, process and start of the owner. The kernel holds the lock (flock)
and releases it when the process ends, however it ends; where a file system has no such locks, the owner's process is
looked up instead, which works on the owner's host only. Processes that a launcher starts besides the first take no
lock: they join the run of the first.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_puzzle.run.files import read_json, to_json

LOCK_FILE = ".lit_puzzle_lock"
TAKEN_FILE = ".lit_puzzle_lock.taken"
_held: set[int] = set()  # descriptors of the locks of this process


def _close_in_child() -> None:
    """Let go of the locks in a forked process: else they would outlive the process that took them."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is made if it does not exist.

    Raises:
        ValueError: another process holds it (names host, process and start), or the folder cannot be written.
    """
    descriptor = _acquire(run_dir)
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        for name in (TAKEN_FILE, LOCK_FILE):
            (run_dir / name).unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(run_dir: Path) -> int:
    file = run_dir / LOCK_FILE
    while True:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ValueError(f"{run_dir} cannot be written: {error.strerror}. Choose another --run_dir.") from error
        try:
            if _take(descriptor, file) and _is_still_there(descriptor, file):
                _sign(descriptor, file)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the owner has removed the file meanwhile


def _take(descriptor: int, file: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(_refusal(file)) from None
    except OSError:  # a file system without locks
        return _take_by_name(file)
    return True


def _take_by_name(file: Path) -> bool:
    """Take the lock where the file system has none: the one process that can make a second file has it.

    Returns:
        True; the second file is removed with the first.
    """
    taken = file.with_name(TAKEN_FILE)
    if taken.is_file() and not _may_be_alive(_read(taken)):
        stale = file.with_name(f"{TAKEN_FILE}.{os.getpid()}")
        taken.rename(stale)
        if _may_be_alive(_read(stale)):  # of a process that has removed the stale file, too, and was faster
            stale.rename(taken)
        stale.unlink(missing_ok=True)
    try:
        descriptor = os.open(taken, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise ValueError(f"{_refusal(taken)} If that process is dead, remove {taken}.") from None
    try:
        _sign(descriptor, taken)
    finally:
        os.close(descriptor)
    return True


def _sign(descriptor: int, file: Path) -> None:
    """Write the owner into a file of the lock; where that fails, the lock is given up."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, to_json(_owner(), None).encode() + b"\n", 0)
    except OSError as error:  # it does not name the file
        for name in (TAKEN_FILE, LOCK_FILE):
            file.with_name(name).unlink(missing_ok=True)
        raise ValueError(
            f"{file} cannot be written: {error.strerror}. Make room, or choose another --run_dir."
        ) from error


def _is_still_there(descriptor: int, file: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == file.stat().st_ino
    except FileNotFoundError:
        return False


def _owner() -> dict[str, Any]:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": now, "ticks": _start_ticks(os.getpid())}


def _start_ticks(pid: int) -> str:
    """Return when a process was started, by the kernel's clock: another one may get its number later."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except ValueError:  # not written yet
        return {}


def _may_be_alive(owner: dict[str, Any]) -> bool:
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or type(pid) is not int or not 0 < pid < 1 << 31:
        return True  # of another host, or one that has not written its name yet
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(owner.get("ticks") == _start_ticks(pid))


def _refusal(file: Path) -> str:
    owner = _read(file)
    who = _process(owner) if owner else "another process"
    return f"{file.parent} is in use by {who}. Wait for it, stop it, or choose another --run_dir."


def working_process(run_dir: Path) -> str | None:
    """Return which process is at work in a run folder, or may be if it is of another host; None: there is none."""
    owner = _read(run_dir / LOCK_FILE)
    if not isinstance(owner.get("pid"), int) or not _may_be_alive(owner):
        return None
    return _process(owner)


def _process(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}"
