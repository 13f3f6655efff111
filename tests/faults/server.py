"""A process that imports the project once and forks a child for every command that is tried.

Reads requests from stdin, one JSON list of runs a line (`faults.commands.Run`); starts the runs of a list at the same
time; answers with one JSON list of what became of them. Importing torch, Lightning and transformers takes seconds, a
fork takes milliseconds: hundreds of commands are affordable.

A child is its own session, and is killed with all its processes at its time limit. On request
it kills itself before its N-th change of the file system, cannot write files beyond a size, or waits for a file first.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import lit_puzzle.child.assemble
import lit_puzzle.data.generate
import lit_puzzle.distill.blocks
import lit_puzzle.distill.global_kd
import lit_puzzle.distill.top_logits
import lit_puzzle.evaluate.accuracy
import lit_puzzle.importance.importance
import lit_puzzle.kv_cache.calibrate
import lit_puzzle.library.candidates
import lit_puzzle.rl.module
import lit_puzzle.rl.trl_engine
import lit_puzzle.scoring.scoring
import lit_puzzle.search.search
import lit_puzzle.serve.export
import lit_puzzle.tiny.pretrain
import lit_puzzle.tiny.world
import lit_puzzle.training.lightning  # noqa: F401  (all of them: loaded once, for every child)
from faults.file_changes import watch
from lit_puzzle.cli import main

POLL_SECONDS = 0.005


def serve() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers goes to the client
    for line in sys.stdin:
        answers.write(json.dumps(run_together(json.loads(line))) + "\n")
        answers.flush()


def run_together(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Start runs at the same time and return, for each, exit status, seconds and whether it was too slow."""
    started, children = time.monotonic(), {}
    for number, run in enumerate(runs):
        process, pipe = start(run)
        children[process] = number, pipe, run["output"]
        Path(run["output"]).write_bytes(b"")
    ends: dict[int, dict[str, Any]] = {}
    while children:
        for process, (number, pipe, output) in list(children.items()):
            found, status = os.waitpid(process, os.WNOHANG)
            drain(pipe, Path(output))
            seconds = time.monotonic() - started
            deliver(runs[number], process)
            too_slow = found == 0 and seconds > runs[number]["limit_seconds"]
            if too_slow:
                os.kill(process, signal.SIGKILL)
                with suppress(ProcessLookupError):  # it had not become a session of its own, or has left nothing
                    os.killpg(process, signal.SIGKILL)
                found, status = os.waitpid(process, 0)
            if found:
                del children[process]
                os.close(pipe)
                end = {"status": os.waitstatus_to_exitcode(status), "seconds": seconds, "too_slow": too_slow}
                ends[number] = end
        time.sleep(POLL_SECONDS if children else 0)
    return [ends[number] for number in range(len(runs))]


def drain(pipe: int, output: Path) -> None:
    """Copy what a child has printed; a child writes to a pipe, because its files may be limited."""
    while True:
        try:
            text = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return
        if not text:
            return
        with output.open("ab") as stream:
            stream.write(text)


def deliver(run: dict[str, Any], process: int) -> None:
    """Send a run its signal, once, as soon as the file is there that it waits for."""
    if run["signal_when"] is not None and (Path(run["folder"]) / run["signal_when"]).exists():
        run["signal_when"] = None
        os.kill(process, run["signal"])


def start(run: dict[str, Any]) -> tuple[int, int]:
    """Fork a child that runs one command; return its process number and the pipe that it prints to."""
    pipe, end = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.dup2(end, 1)
            os.dup2(end, 2)
            status = work(run)
        except BaseException:  # the end of this process, as the interpreter would end it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(end)
    os.set_blocking(pipe, False)
    return process, pipe


def work(run: dict[str, Any]) -> int:
    """Run the command of `lightning` in this process and return its exit status."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(run["folder"])
    os.environ.update(run["environment"])
    sys.argv = ["lightning", *run["words"]]
    while run["waits_for"] is not None and not Path(run["waits_for"]).exists():
        time.sleep(POLL_SECONDS)
    limit_files(run["file_bytes"], run["dies_when_full"])
    changes = watch(Path(run["folder"]).resolve() / run["watched"], run["kill_before_change"])
    try:
        main(run["words"])
        return 0
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
            return 1
        return stopped.code or 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(run["output"] + ".changes").write_text("\n".join(changes))


def limit_files(file_bytes: int | None, dies_when_full: bool) -> None:
    """Let no file grow beyond a size: writing more is an error, as on a full disk, or ends the process mid-write."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies_when_full else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))


if __name__ == "__main__":
    serve()
