"""A server of rollouts: gives a run that trains elsewhere an engine of vLLM on this machine's GPUs, by address.

    export LIT_PUZZLE_ROLLOUT_KEY=...                                         the same on both sides
    python -m lit_puzzle.generation.rollout_server --address=0.0.0.0:5005     ends with Ctrl-C
    export LIT_PUZZLE_ROLLOUT_SERVERS=10.0.0.7:5005                           where the run starts, with engine: server

A run that connects gets an engine's process of its own, over all GPUs that the server sees, started from the run's
folder; when the connection ends, however it does, so does the engine, and nothing of the run is left. A run that
stops in the middle of a message (`lit_puzzle.generation.wire`) loses the engine. One run at a time has the engine, a
second one is refused; for two engines on one machine start two servers, each with its CUDA_VISIBLE_DEVICES.

Reads checkpoint folders that the run names, under the same path as there (the fingerprint is compared); the weights
that train come through the connection into a file in shared memory. Writes nothing. Memory: the engine's, 92% of each
GPU or `kv_cache_gib` beside the weights, and the sent tensors once. Traffic: `lit_puzzle.generation.served_engine`.
"""

import argparse
import os
import socket
import sys
import threading
from contextlib import closing, suppress
from multiprocessing.connection import wait

from lit_puzzle.generation.processes import EngineProcess, visible_gpus
from lit_puzzle.generation.rollout_engine import vllm_process
from lit_puzzle.generation.served_engine import answer_of
from lit_puzzle.generation.server_calls import engine_call
from lit_puzzle.generation.wire import KEY, SAME_VERSION, Wire, host_and_port, key_from_environment
from lit_puzzle.run.user_errors import one_line_errors, printable

BUSY_SECONDS = 20.0  # in which the engine of a run that was killed has ended
RETRY_SECONDS = 1.0  # until runs are accepted again after the system refused one, for want of open files for example


class RolloutServer:
    """Listens at an address; each connection is served by a thread, one at a time has the engine.

    Args:
        address: HOST:PORT; port 0: a free one.
        key: that runs have to know.

    Attributes:
        address: with the port that was taken.

    Raises:
        ValueError: the address is not one of this machine, or is taken.
    """

    def __init__(self, address: str, key: bytes) -> None:
        host, port = host_and_port(address)
        self._key, self._busy, self._closed = key, threading.Lock(), threading.Event()
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listening = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ValueError(f"--address={address} was given; it cannot be listened at ({error}).") from None
        self.address = f"{address.rpartition(':')[0]}:{self._listening.getsockname()[1]}"

    def serve(self) -> None:
        """Serve runs until `close`; where the system cannot accept one, say so and try again."""
        while not self._closed.is_set():
            try:
                stream, _ = self._listening.accept()
            except OSError as error:
                if not self._closed.wait(RETRY_SECONDS):
                    print(f"no run can connect ({error}); trying again", file=sys.stderr, flush=True)
            else:
                threading.Thread(target=self._visit, args=(stream,), daemon=True).start()

    def close(self) -> None:
        """Listen no longer; a run that is connected keeps its engine."""
        self._closed.set()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _visit(self, stream: socket.socket) -> None:
        with suppress(OSError, EOFError), closing(Wire(stream)) as wire:  # whoever it was may leave at any time
            if wire.prove(self._key, is_server=True):
                self._serve_one(wire)

    def _serve_one(self, wire: Wire) -> None:
        if not self._busy.acquire(timeout=BUSY_SECONDS):
            with suppress(ValueError):
                wire.receive()
            wire.send({"refused": "it serves another run. Wait for its end, or start a server for each run."})
            return
        try:
            serve_run(wire)
        finally:
            self._busy.release()


def serve_run(wire: Wire) -> None:
    """Answer a run's calls with an engine of its own, until the connection ends or a call is refused.

    Raises:
        OSError, EOFError: the connection has ended.
    """
    gpus = visible_gpus()
    engine = vllm_process("vLLM of the server", 0, gpus, max(len(gpus), 1))
    weights = os.fdopen(os.memfd_create("served_weights"), "r+b", buffering=0)
    is_loaded = False
    try:
        with weights:
            while True:
                call = engine_call(wire, wire.receive(), weights, len(gpus))
                if (call[0] == "load") == is_loaded:
                    raise ValueError(f"it was asked to {call[0]} {'again' if is_loaded else 'first'}. {SAME_VERSION}")
                engine.send(*call)
                if not _forward(wire, engine):
                    return
                is_loaded = True
    except ValueError as error:
        wire.send({"refused": printable(str(error)).replace("\n", " ")})
    finally:
        engine.close()
        engine.end(0)


def _forward(wire: Wire, engine: EngineProcess) -> bool:
    """Pass on what an engine tells until it has answered; return whether it can be called again.

    Raises:
        OSError, EOFError: the connection has ended.
        ValueError: the run says something before it has the answer.
    """
    while True:
        if wire.connection in wait([engine.connection, wire.connection]):
            wire.receive()  # ends here if the run has left
            raise ValueError(f"it was sent a call before it had answered the last one. {SAME_VERSION}")
        try:
            kind, answer = engine.connection.recv()
        except (EOFError, OSError):
            kind, answer = "refused", engine.ended()
        if isinstance(answer, list):
            for completion in answer:
                wire.send(answer_of(completion))
            answer = len(answer)
        wire.send({kind: answer})
        if kind != "works":
            return bool(kind == "done")


def main() -> None:
    """Serve runs until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:5005", help="HOST:PORT at which runs connect")
    with one_line_errors():
        server = RolloutServer(parser.parse_args().address, key_from_environment())
        gpus = ", ".join(visible_gpus()) or "none, the CPU"
        print(f"rollouts at {server.address} for runs with the same {KEY}; GPUs: {gpus}. Ctrl-C ends it.", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve()


if __name__ == "__main__":
    main()
