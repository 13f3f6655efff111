"""peers.py: who has finished is not reported as killed; who ends without a word is reported as it ended.

What happens in a collective is tested with real runs: `tests/training/test_rank_failure.py`.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROCESS = ROOT / "tests" / "helpers" / "peer_process.py"


def run(folder: Path, way: str) -> subprocess.CompletedProcess[str]:
    """Run both processes; what both print is complete when both have ended, for they share a pipe."""
    variables = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, PROCESS, folder, way],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("way", ["finish", "two trainers", "late"])
def test_who_has_finished_is_not_reported(tmp_path: Path, way: str) -> None:
    done = run(tmp_path, way)
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


@pytest.mark.parametrize(("way", "message"), [("crash", "was killed by SIGSEGV"), ("exit", "ended with exit code 3")])
def test_who_ends_without_a_word_is_reported_as_it_ended(tmp_path: Path, way: str, message: str) -> None:
    began = time.monotonic()
    done = run(tmp_path, way)
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert f"error: process 1 of 2 {message}. This process stops, too; the same command continues" in done.stdout
    assert not (tmp_path / "0").exists() and not (tmp_path / "1").exists()
