"""Where tests find a real vLLM: an environment made by scripts/vllm_env.sh; VLLM_PYTHON names the interpreter of another.

Tests that need it are skipped, and say so, where there is none.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
missing = pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM environment at {PYTHON}: bash scripts/vllm_env.sh")


def needs_vllm(test):
    """Mark a test that runs the environment's python."""
    return pytest.mark.vllm(missing(test))


def start_in_vllm(*words: str | Path) -> subprocess.Popen[str]:
    """Start the environment's python on these words, with this project's code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([PYTHON, *words], text=True, env=environment, **pipes)


def run_in_vllm(*words: str | Path) -> str:
    """Return what the environment's python prints, after checking that it ended well."""
    process = start_in_vllm(*words)
    output, log = process.communicate()
    assert process.returncode == 0, log[-3000:]
    return output
