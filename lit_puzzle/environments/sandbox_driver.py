"""Runs a program on inputs inside the sandbox: one fork for each input. Nothing that it says is trusted.

`lit_puzzle.environments.sandbox` hands its source to the Python in the sandbox (standard library only). Frames on
standard input and output are 4 bytes of length and JSON. First comes `{source, function, limits, uid}`, then inputs;
each gets a reply `{status, output}`, which the outside compares with what it expects: expected outputs never come here,
so a program that takes this process over can only claim outputs that it has computed.

    status      `ok`, or what ended the program: `time limit`, `output limit`, `exit code N`, `signal N`
    output      what it printed; with a function, the JSON of what that returned

After each input everything that is left of the program is killed.
"""

import contextlib
import io
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

CHUNK = 1 << 16


def read_frame(descriptor: int) -> Any:
    """Return the value of the next frame; None at the end."""
    head = read_exactly(descriptor, 4)
    return json.loads(read_exactly(descriptor, struct.unpack(">I", head)[0])) if head else None


def read_exactly(descriptor: int, size: int) -> bytes:
    """Return so many bytes; fewer, none in the end, where the stream ends."""
    parts = b""
    while len(parts) < size:
        part = os.read(descriptor, size - len(parts))
        if not part:
            return b""
        parts += part
    return parts


def write_frame(descriptor: int, value: Any) -> None:
    """Write a frame."""
    data = json.dumps(value).encode()
    view = memoryview(struct.pack(">I", len(data)) + data)
    while view:
        view = view[os.write(descriptor, view) :]


def limit_processes(uid: int | None, limits: dict[str, Any]) -> None:
    """Become a plain user if this is root, and set the limits that hold for all that follows."""
    for name, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_NPROC, limits["processes"] + 2),  # with this one and the first of all
    ):
        resource.setrlimit(name, (value, value))
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def run_program(program: dict[str, Any], given: Any, output: int) -> None:
    """Run the program in this process, which then ends; its standard output is that of the process.

    Args:
        program: the first frame.
        given: text of standard input, or arguments of the function.
        output: descriptor for the JSON of what a function returns.
    """
    name = program["function"]
    scope: dict[str, Any] = {"__name__": "__main__" if name is None else "solution"}
    sys.setrecursionlimit(100_000)
    try:
        exec(compile(program["source"], "solution.py", "exec"), scope)
        if name is not None:
            solution = scope[name] if name in scope else getattr(scope["Solution"](), name)
            result = solution(**given) if isinstance(given, dict) else solution(*given)
            os.write(output, json.dumps(result, default=list).encode())
    except SystemExit as error:
        finish(error.code if isinstance(error.code, int) else int(error.code is not None))
    except BaseException:  # whatever it raises, the program has failed
        finish(1)
    finish(0)


def finish(code: int) -> None:
    """End this process with what it has printed."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        code = code or 1
    os._exit(code & 255)


def child(program: dict[str, Any], given: Any, output: int) -> None:
    """Become the process of the program: its own limits, standard streams, and nothing else open."""
    cpu = program["limits"]["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    memory = program["limits"]["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    nothing = os.open("/dev/null", os.O_RDWR)
    function = program["function"] is not None
    os.dup2(nothing, 0)
    os.dup2(nothing if function else output, 1)
    os.dup2(nothing, 2)
    os.dup2(output, 3)
    os.closerange(4, 256)
    if not function:
        os.close(3)
        stand_in(given)
    run_program(program, given, 3)


def stand_in(given: str) -> None:
    """Make a text the standard input, through a file that has no name (a program may also read descriptor 0)."""
    descriptor = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    view = memoryview(given.encode())
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.dup2(descriptor, 0)
    os.close(descriptor)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")


def run_one(program: dict[str, Any], given: Any) -> dict[str, str]:
    """Return what came of the program on one input."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        child(program, given, writing)
    os.close(writing)
    try:
        status, data = collect(process, reading, program["limits"])
    finally:
        os.close(reading)
        clear_away()
    return {"status": status, "output": data.decode(errors="replace")}


def collect(process: int, reading: int, limits: dict[str, Any]) -> tuple[str, bytes]:
    """Read output until the process ends or a limit is reached; return what ended it, and the output."""
    deadline, data, code = time.monotonic() + limits["wall_seconds"], b"", None
    while code is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return "time limit", data
        ready, _, _ = select.select([reading], [], [], min(left, 0.02))
        part = os.read(reading, CHUNK) if ready else b""
        data += part
        if len(data) > limits["output_bytes"]:
            return "output limit", b""
        if not part:
            ended, status = os.waitpid(process, os.WNOHANG)
            code = status if ended else None
    os.set_blocking(reading, False)
    data += rest(reading, limits["output_bytes"])
    if os.WIFSIGNALED(code):
        number = os.WTERMSIG(code)
        return ("time limit" if number == signal.SIGXCPU else f"signal {number}"), data
    return ("ok" if os.WEXITSTATUS(code) == 0 else f"exit code {os.WEXITSTATUS(code)}"), data


def rest(reading: int, most: int) -> bytes:
    """Return what is left in a pipe."""
    data = b""
    while len(data) <= most:
        try:
            part = os.read(reading, CHUNK)
        except BlockingIOError:
            break
        if not part:
            break
        data += part
    return data


def clear_away() -> None:
    """Kill and collect every process but this one."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main() -> None:
    """Serve inputs until the outside closes the stream."""
    program = read_frame(0)
    limit_processes(program["uid"], program["limits"])
    write_frame(1, {"status": "ready", "output": ""})
    while (request := read_frame(0)) is not None:
        write_frame(1, run_one(program, request["input"]))


if __name__ == "__main__":
    main()
