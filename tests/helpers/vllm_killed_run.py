"""In vLLM's environment: `lightning run` of which one process, or its engine, is killed at a chosen moment.

    python vllm_killed_run.py WHAT NUMBER RANK run RECIPE ...

WHAT: `sync` (the process, before it writes its N-th tensor for the engine), `asks` (the process, when it asks for the
N-th time), `engine_reads` (the engine, when it is told for the N-th time to read new weights), `engine_generates` (the
engine, a little after it was asked for the N-th time). RANK: of which process. The other processes run undisturbed.
"""

import os
import signal
import sys
from threading import Timer
from typing import Any

from lit_puzzle.cli import main
from lit_puzzle.generation.processes import EngineProcess
from lit_puzzle.generation.trained_weights import SharedWeights

CALLS = {"asks": "generate", "engine_reads": "read_trained", "engine_generates": "generate"}


def arm(what: str, number: int) -> None:
    """Have this process, or its engine, killed."""
    seen = 0

    def is_due() -> bool:
        nonlocal seen
        seen += 1
        return seen == number

    write, send = SharedWeights.write, EngineProcess.send

    def killed_write(self: Any, *arguments: Any) -> None:
        if is_due():
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *arguments)

    def killed_send(self: Any, name: str, *arguments: Any) -> None:
        send(self, name, *arguments)
        if name != CALLS[what] or not is_due():
            return
        if what == "asks":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "engine_reads":
            self.process.kill()
        else:
            Timer(0.3, self.process.kill).start()

    if what == "sync":
        SharedWeights.write = killed_write  # type: ignore[method-assign, assignment]
    else:
        EngineProcess.send = killed_send  # type: ignore[method-assign]


if __name__ == "__main__":
    what, number, rank = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if os.environ.get("LOCAL_RANK", "0") == rank:
        arm(what, number)
    main(sys.argv[4:])
