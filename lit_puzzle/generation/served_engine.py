"""An engine of vLLM behind a rollout server, as the run that trains sees it: `EngineProcess` on another GPU or machine.

    load          names a folder that the server must see under the same path: a file system that both have
    read_trained  sends the tensors that train, as the file of `lit_puzzle.generation.trained_weights`
    generate      sends token ids; gets tokens and log-probabilities, each completion in a message of its own

Reads that file and the folder's fingerprint; writes nothing. Traffic: these bytes, once for each server.
"""

import reprlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lit_puzzle.generation.engine import Completion
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.wire import KEY, SAME_VERSION, STALLED_SECONDS, Wire, connect, key_from_environment
from lit_puzzle.model.checkpoint import fingerprint

CONNECT_SECONDS = 60.0
PROGRAM = "python -m lit_puzzle.generation.rollout_server"


class ServedEngine:
    """A server's engine, and the connection to it, which ends the engine when it ends.

    Args:
        address: HOST:PORT of the server.
        connect_seconds: longest time in which the server may come up.

    Raises:
        ValueError: nobody answers there, or the keys differ.
    """

    def __init__(self, address: str, connect_seconds: float = CONNECT_SECONDS) -> None:
        self.name = f"The rollout server at {address}"
        key = key_from_environment()
        try:
            self.wire: Wire = connect(address, connect_seconds)
        except OSError as error:
            raise ValueError(
                f"{self.name} cannot be reached ({error}). Start it there: {PROGRAM} --address={address}, with the "
                f"same {KEY}; the same command resumes."
            ) from None
        try:
            is_right = self.wire.prove(key, is_server=False)
        except OSError:
            is_right = False
        if not is_right:
            self.wire.close()
            raise ValueError(f"{self.name} has another {KEY}, or is something else. Give both the same one.")

        self.stalled = False

    def load(self, folder: Path, dtype: str, temperature: float, settings: RolloutSettings) -> None:
        """Ask for an engine with the weights of a folder."""
        sizes = {"kv_cache_gib": settings.kv_cache_gib, "context_tokens": settings.context_tokens}
        self._send("load", **_named(folder), dtype=dtype, temperature=temperature, **sizes)

    def send(self, name: str, *arguments: Any) -> None:
        """Call it, as `EngineProcess.send`; a connection that fails is found when the answer is waited for."""
        match name, arguments:
            case "generate", (prompts, Sampling() as sampling, rows):
                tokens = [list(map(int, ids)) for ids in prompts]
                self._send(name, prompts=tokens, sampling=asdict(sampling), rows=list(map(int, rows)))
            case "read_trained", (Path() as weights,):
                self._send(name, bytes=weights.stat().st_size)
                self._try(partial(self.wire.send_file, weights))
            case "read_folder", (Path() as folder,):
                self._send(name, **_named(folder))
            case _:
                raise ValueError(f"A rollout server was asked for {name!r}.")

    def _send(self, call: str, **values: Any) -> None:
        self._try(partial(self.wire.send, {"call": call} | values))

    def _try(self, send: Callable[[], None]) -> None:
        try:
            send()
        except BlockingIOError:
            self.stalled = True
        except OSError:
            pass  # the server may have said why

    def receive(self, silent_seconds: float | None = None) -> Any:
        """Return its answer; see `EngineProcess.receive`.

        Raises:
            ValueError: it refused or failed, has ended, told nothing for too long, or something else than answers.
        """
        completions: list[Completion] = []
        while True:
            message = self._message(silent_seconds)
            match message:
                case {"works": int()}:
                    pass
                case {"completion": [list() as ids, "stop" | "length" as finish, None | list() as logprobs, seconds]}:
                    completions.append(Completion(ids, finish, logprobs, seconds))
                case {"done": None}:
                    return None
                case {"done": int() as made} if made == len(completions):
                    return completions
                case {"refused": str() as why}:
                    raise ValueError(f"{self.name}: {why}")
                case _:
                    raise ValueError(f"{self.name} told {reprlib.repr(message)}. {SAME_VERSION}")

    def _message(self, silent_seconds: float | None) -> Any:
        try:
            if self.stalled:
                raise ValueError(
                    f"it has read nothing of a message for {STALLED_SECONDS:g} seconds: it hangs, or its machine does. "
                    "Start it again; the same command resumes."
                )
            if silent_seconds is not None and not self.wire.connection.poll(silent_seconds):
                raise ValueError(
                    f"it has told nothing for {silent_seconds:g} seconds: it hangs, or needs longer than "
                    "rollouts.engine_seconds. The same command resumes."
                )
            return self.wire.receive()
        except (EOFError, OSError):
            raise ValueError(
                f"{self.name} has ended the connection: it was stopped, or its machine was. Start it again; the same "
                "command resumes."
            ) from None
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def close(self) -> None:
        """End the connection, and with it the engine."""
        self.wire.close()

    def end(self, patience_seconds: float) -> None:
        """Do nothing: the server ends the engine."""


def _named(folder: Path) -> dict[str, str]:
    return {"folder": str(folder.resolve()), "fingerprint": fingerprint(folder)}


def answer_of(completion: Completion) -> dict[str, Any]:
    """Return the message that carries a completion; its numbers are the same in every bit."""
    return {"completion": [completion.token_ids, completion.finish, completion.logprobs, completion.seconds]}
