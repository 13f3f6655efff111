"""The record of a run: the commit of the checkout, which is read and never locked, and the time of the end."""

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lit_puzzle.run import record
from lit_puzzle.run.files import read_json
from lit_puzzle.run.record import RunClock, git_commit


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_of_a_checkout_that_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "PACKAGE", tmp_path)
    assert git_commit() is None
    git(tmp_path, "init")
    file, index = tmp_path / "code.py", tmp_path / ".git" / "index"
    file.write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "First")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("untracked")
    file.touch()  # git would note the new time in its index, under a lock
    before = index.stat()
    assert git_commit() == commit
    file.write_text("x = 2\n")
    assert git_commit() == f"{commit}+changes"
    assert index.stat().st_ino == before.st_ino and index.stat().st_mtime_ns == before.st_mtime_ns


def test_the_end_is_in_utc_in_microseconds(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    RunClock().close(tmp_path, Path("recipes/some.yaml"), None, False, {})
    text = read_json(tmp_path / "run.json")["ended"]
    ended = datetime.fromisoformat(text)
    assert text == f"{ended:%Y-%m-%dT%H:%M:%S.%f}+00:00" and before <= ended <= datetime.now(UTC)
