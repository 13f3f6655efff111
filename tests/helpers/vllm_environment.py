"""Where tests find a real vLLM: the environment of scripts/vllm_env.sh, or the one whose interpreter VLLM_PYTHON names.

Tests that need it are skipped, and listed as such, where there is none.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
NEEDS_VLLM = [  # marks
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM environment at {PYTHON}: bash scripts/vllm_env.sh"),
]


def needs_vllm(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that runs the environment's python."""
    for mark in NEEDS_VLLM:
        test = mark(test)
    return test


def start_in_vllm(*words: str | Path) -> subprocess.Popen[str]:
    """Start the environment's python on these words, with this project's code."""
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([PYTHON, *words], text=True, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def output_of(process: subprocess.Popen[str], seconds: float = 900) -> str:
    """Return what a process prints, after checking that it ends in time, and well."""
    try:
        output, log = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, log[-3000:]
    return output
