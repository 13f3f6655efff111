"""A server of rollouts: gives a run that trains elsewhere an engine of vLLM on this machine's GPUs, by address.

    export LIT_PUZZLE_ROLLOUT_KEY=...                                         the same on both sides
    python -m lit_puzzle.generation.rollout_server --address=0.0.0.0:5005     ends with Ctrl-C
    export LIT_PUZZLE_ROLLOUT_SERVERS=10.0.0.7:5005                           where the run starts, with engine: server

A run that connects gets an engine's process of its own, over all GPUs that the server sees,
started from the run's folder; when the connection ends, however it does, so does the engine, and nothing of the run is
left. One run at a time has the engine, a second one is refused; for two engines on one machine start two servers, each
with its CUDA_VISIBLE_DEVICES.

Reads checkpoint folders that the run names, under the same path as there (the fingerprint is compared); the weights
that train come through the connection into a file in shared memory. Writes nothing. Memory: the engine's, 92% of each
GPU or `kv_cache_gib` beside the weights, and the sent tensors once. Traffic: `lit_puzzle.generation.served_engine`.
"""

import argparse
import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO

from lit_puzzle.generation.processes import EngineProcess, visible_gpus
from lit_puzzle.generation.rollout_engine import engine_options, vllm_process
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.served_engine import rows_of
from lit_puzzle.generation.wire import KEY, Wire, host_and_port, key_from_environment
from lit_puzzle.model.checkpoint import fingerprint
from lit_puzzle.run.strict_json import checked_fields, checked_keys
from lit_puzzle.run.user_errors import one_line_errors

GPU_SHARE = 0.92  # vLLM's own default, of a GPU that nobody else uses
BUSY_SECONDS = 20.0  # in which the engine of a run that was killed has ended
ARGUMENTS = {  # of each call
    "load": ("folder", "fingerprint", "dtype", "temperature", "kv_cache_gib", "context_tokens"),
    "generate": ("prompts", "sampling", "rows"),
    "read_trained": ("bytes",),
    "read_folder": ("folder", "fingerprint"),
}


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
        self._key, self._busy = key, threading.Lock()
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listening = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ValueError(f"--address={address} was given; it cannot be listened at ({error}).") from None
        self.address = f"{address.rpartition(':')[0]}:{self._listening.getsockname()[1]}"

    def serve(self) -> None:
        """Serve runs until `close`."""
        while True:
            try:
                stream, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._visit, args=(Wire(stream),), daemon=True).start()

    def close(self) -> None:
        """Listen no longer; a run that is connected keeps its engine."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _visit(self, wire: Wire) -> None:
        try:
            if wire.prove(self._key, is_server=True):
                self._serve_one(wire)
        except (OSError, EOFError):
            pass  # whoever it was has left
        finally:
            wire.close()

    def _serve_one(self, wire: Wire) -> None:
        if not self._busy.acquire(timeout=BUSY_SECONDS):
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
    try:
        with weights:
            while True:
                call = wire.receive()
                try:
                    engine.send(*engine_call(wire, call, weights, len(gpus)))
                except ValueError as error:
                    wire.send({"refused": str(error)})
                    return
                if not _forward(wire, engine):
                    return
    finally:
        engine.close()
        engine.end(0)


def _forward(wire: Wire, engine: EngineProcess) -> bool:
    """Pass on what an engine tells until it has answered; return whether it can be called again."""
    while True:
        if wire.connection in wait([engine.connection, wire.connection]):
            raise EOFError("a run that waits for an answer says nothing: it has left")
        try:
            kind, answer = engine.connection.recv()
        except (EOFError, OSError):
            kind, answer = "refused", engine.ended()
        wire.send({kind: rows_of(answer) if isinstance(answer, list) else answer})
        if kind != "works":
            return bool(kind == "done")


def engine_call(wire: Wire, call: Any, weights: BinaryIO, gpus: int) -> tuple[Any, ...]:
    """Return the call of an engine's process that a run's message asks for.

    Args:
        wire: from which weights follow.
        call: the message.
        weights: file in shared memory that gets them.
        gpus: how many GPUs the engine has.

    Raises:
        ValueError: another message than those of `ServedEngine`, or a folder that is not here.
    """
    name = call.get("call") if isinstance(call, Mapping) else None
    if name not in ARGUMENTS:
        raise ValueError(f"it was asked for {str(call)[:80]!r}. Give run and server the same version of lit_puzzle.")
    values = checked_keys(str(name), call, ("call", *ARGUMENTS[name]))
    if name == "generate":
        return name, values["prompts"], Sampling(**checked_fields(Sampling, values["sampling"])), values["rows"]
    if name == "read_trained":
        wire.receive_file(weights, values["bytes"])
        return name, Path(f"/proc/{os.getpid()}/fd/{weights.fileno()}")
    folder = Path(values["folder"])
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"it does not see {folder}. A server reads the run's folders: give both machines one file system, "
            "under the same path."
        )
    if fingerprint(folder) != values["fingerprint"]:
        raise ValueError(f"its {folder} is not the run's: the fingerprints differ. Copy it again.")
    return (name, folder) if name == "read_folder" else (name, *_loading(folder, values, gpus))


def _loading(folder: Path, values: Mapping[str, Any], gpus: int) -> tuple[Any, ...]:
    sizes = {name: values[name] for name in ("kv_cache_gib", "context_tokens")}
    settings = RolloutSettings("vllm", gpu_memory_share=GPU_SHARE, **sizes)
    options = engine_options(settings, gpus > 0) | ({"enable_sleep_mode": False} if gpus else {})
    wanted = EngineSettings("vllm", values["dtype"], tensor_parallel=max(gpus, 1))
    return wanted, folder, options, float(values["temperature"]), True


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
