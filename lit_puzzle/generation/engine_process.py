"""The process of one engine; started by `lit_puzzle.generation.processes` with an open connection.

Receives calls, a name and its arguments: first `load`, then `generate` or `generate_telling` and, of vLLM,
`read_trained`, `read_folder`, `sleep` and `wake`. Answers each with ("done", result) or ("refused", message of a
ValueError). In between it sends ("works", steps so far) if it was loaded so, and, of `generate_telling`, ("ended",
(row, completion)) for each completion. Ends when the connection does. Reads the checkpoint;
writes nothing.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from lit_puzzle.generation.engine import Engine
from lit_puzzle.generation.load import load_one
from lit_puzzle.generation.vllm_engine import VLLMEngine

TELLS_EVERY_SECONDS = 1.0


def main(connection: Connection) -> None:
    """Serve one engine until the connection ends."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    serve(connection)


def serve(connection: Connection) -> None:
    """Answer the calls of a connection until it ends, or one is refused."""
    engine: Engine | None = None
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            if name == "load":
                engine = _load(connection, *arguments)
                answer = None
            else:
                assert engine is not None
                answer = _call(connection, engine, name, arguments)
        except ValueError as error:
            connection.send(("refused", str(error)))
            return
        connection.send(("done", answer))


def _load(
    connection: Connection, settings: Any, checkpoint: Any, options: Any, temperature: float = 1.0, tells: bool = False
) -> Engine:
    engine = load_one(settings, checkpoint, options=options, temperature=temperature)
    if tells and isinstance(engine, VLLMEngine):
        engine.on_step = _teller(connection)
    return engine


def _teller(connection: Connection) -> Callable[[int], None]:
    """Return a function that tells now and then how many steps an engine has made."""
    told = [time.monotonic()]

    def tell(steps: int) -> None:
        if time.monotonic() - told[0] >= TELLS_EVERY_SECONDS:
            told[0] = time.monotonic()
            connection.send(("works", steps))

    return tell


def _call(connection: Connection, engine: Engine, name: str, arguments: Any) -> Any:
    if name == "generate":
        return engine.generate(*arguments)
    if name == "generate_telling":
        prompts, sampling, rows = arguments
        return engine.generate(prompts, sampling, rows, lambda row, ended: connection.send(("ended", (row, ended))))
    assert isinstance(engine, VLLMEngine)
    match name:
        case "read_trained":
            return engine.read_trained(*arguments)
        case "read_folder":
            return engine.read_folder(*arguments)
        case "sleep":
            return engine.sleep()
        case "wake":
            return engine.wake()
    raise ValueError(f"An engine's process was asked for {name!r}.")


def _end_with(parent: int) -> None:
    """End this process and those that it has started when the stage is killed: nobody would close the connection."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)  # this process leads a session of its own


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
