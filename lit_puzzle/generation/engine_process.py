"""The process of one engine among several; started by `lit_puzzle.generation.data_parallel` with an open connection.

Receives settings, checkpoint and options, then calls of `generate`; answers each with ("done", result) or ("refused",
message of a ValueError). Ends when the connection does. Reads the checkpoint; writes nothing.
"""

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from lit_puzzle.generation.engine import Engine
from lit_puzzle.generation.load import load_one


def main(connection: Connection) -> None:
    """Serve one engine until the connection ends."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    engine: Engine | None = None
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        try:
            if engine is None:
                settings, checkpoint, options = message
                engine = load_one(settings, checkpoint, options=options)
                answer = None
            else:
                answer = engine.generate(*message)
        except ValueError as error:
            connection.send(("refused", str(error)))
            return
        connection.send(("done", answer))


def _end_with(parent: int) -> None:
    """End this process and those that it has started when the stage is killed: nobody would close the connection."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)  # this process leads a session of its own


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
