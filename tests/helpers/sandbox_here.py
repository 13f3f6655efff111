"""Whether this machine makes sandboxes: tests that run programs are skipped, with the reason, where it does not."""

import pytest

from lit_puzzle.environments.sandbox import SandboxError, check_sandbox


def why_not() -> str:
    """Why this machine makes none; empty if it does."""
    try:
        check_sandbox()
    except SandboxError as error:
        return str(error)
    return ""


WHY_NOT = why_not()
needs_sandbox = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
