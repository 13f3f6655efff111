"""`LocalEngine` behind a pipe, as a rollout server sees the process of an engine: transformers' model in a thread.

A call of `stuck` tokens at most never answers, and one of `fatal` tokens ends the engine.
"""

import threading
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, ClassVar

from helpers.local_engine import LocalEngine

STUCK, FATAL = 61, 62  # max_new_tokens of such calls


class PipedEngine:
    """Stands for `EngineProcess`."""

    started: ClassVar["list[PipedEngine]"] = []

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.has_ended = name, threading.Event()
        self.connection, other = Pipe()
        PipedEngine.started.append(self)
        threading.Thread(target=self._serve, args=(other,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with suppress(EOFError, OSError):
            self._answer(connection)
        connection.close()

    def _answer(self, connection: Connection) -> None:
        local = LocalEngine(self.name)
        while True:
            name, arguments = connection.recv()
            tokens = arguments[1].max_new_tokens if name == "generate" else 0
            connection.send(("works", 1))
            if tokens == FATAL:
                return
            if tokens != STUCK:
                local.send(name, *arguments)
                connection.send(("done", local.receive()))

    def send(self, name: str, *arguments: Any) -> None:
        self.connection.send((name, arguments))

    def ended(self) -> str:
        return f"{self.name} was killed by SIGKILL."

    def close(self) -> None:
        self.connection.close()

    def end(self, patience_seconds: float) -> None:
        self.has_ended.set()
