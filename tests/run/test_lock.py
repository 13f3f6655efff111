"""The lock of a run folder: one process at a time, free again however its owner ends."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest

from lit_puzzle.run import lock
from lit_puzzle.run.lock import LOCK_FILE, locked

HOLD = """
import fcntl, sys, time
def unsupported(descriptor, operation):
    raise OSError("not supported")
if sys.argv[2:] == ["without"]:
    fcntl.flock = unsupported
from pathlib import Path
from lit_puzzle.run.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(run_dir: Path, *words: str) -> subprocess.Popen[str]:
    """Start a process that holds the lock of a folder, and wait until it does."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir), *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    try:
        with (
            pytest.raises(ValueError, match=f"run is in use by process {process.pid} on ") as refused,
            locked(tmp_path / "run"),
        ):
            pass
        assert "--run_dir" in str(refused.value) and "\n" not in str(refused.value)
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "run" / LOCK_FILE).is_file()  # stale
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def sleep_in_child() -> None:
    time.sleep(60)


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A worker may outlive a killed run by some seconds."""
    with locked(tmp_path):
        child = get_context("fork").Process(target=sleep_in_child)
        child.start()
    try:
        with locked(tmp_path):
            assert child.is_alive()
    finally:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()


@pytest.mark.parametrize("alive", [True, False])
def test_without_locks_of_the_file_system_the_owner_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError("not supported")

    process = holder(tmp_path, "without")
    if not alive:
        process.kill()
        process.wait()
    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    try:
        if alive:
            with pytest.raises(ValueError, match="If that process is dead, remove"), locked(tmp_path):
                pass
        else:
            with locked(tmp_path):
                pass
    finally:
        process.kill()
        process.wait()


def test_the_owner_on_another_host_counts_as_alive(tmp_path: Path) -> None:
    own = lock._owner()
    assert lock._may_be_alive(own)
    assert lock._may_be_alive(own | {"host": "elsewhere"})
    assert not lock._may_be_alive(own | {"ticks": "1"})  # another process of this number
    assert lock._may_be_alive({})  # one that has not written its name yet


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pass


@contextmanager
def no_room() -> Iterator[None]:
    """Let no file grow, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_full_disk_is_one_line_and_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError("not supported")

    if not has_locks:
        monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with (
        no_room(),
        pytest.raises(ValueError, match=r"lock(\.taken)? cannot be written: File too large"),
        locked(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
