"""A process that fails ends the other processes of its run, also where they wait for it in a collective.

A collective waits as long as the process group allows (a day, by default): a process that raises an error or is killed
would keep the others waiting. Here the first process listens, and every other process keeps a connection to it, which
the kernel closes when either ends, however it ends. Who fails sends its message before; who finishes says so. A thread
of every process waits for that, and ends its process within `PATIENCE_SECONDS` of another one's failure: the main
thread may be inside a library, where no signal or exception reaches it.

Who ends without a word was killed, or has crashed in a library: its exit code tells the process that has started it.

A process that Lightning has started ends with the one that started it, too, before there is a connection.

Reads and writes nothing but these connections: a line of JSON, `{"token": ..., "rank": ...}` at the start and
`{"done": true}`, `{"failed": message}` or `{"passed_on": message}` at the end. Needs no torch.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

PATIENCE_SECONDS = 2.0  # in which a main thread that still can ends by itself
HINT = "This process stops, too; the same command continues the run."
STARTED_BY = "LIT_PUZZLE_STARTED_BY"
FAILED = 1  # exit code
JOIN_SECONDS = 300.0  # in which all processes connect
ENDING_SECONDS = 10.0  # between the end of a connection and that of its process

Started = Mapping[int, "subprocess.Popen[bytes]"]


@dataclass
class _Peers:
    """What a process knows of the others: its connections, and the first failure that it heard of."""

    rank: int
    world_size: int
    connections: dict[int, socket.socket]
    started: Started
    failure: str | None = None
    heard: threading.Event = field(default_factory=threading.Event)
    leaving: bool = False


class _State:
    inside = False  # of `failing_together`, where it is told that a process has finished
    peers: _Peers | None = None
    connected = False  # once; the connection says from then on how the first process ends


def connect(
    rank: int, world_size: int, broadcast: Callable[[Any], Any], started: Started = MappingProxyType({})
) -> None:
    """Connect the processes of a run, right after they have formed their process group; all of them call it.

    Processes that are connected stay so: a run may have several Trainers.

    Args:
        rank: of this process.
        world_size: number of processes. Nothing happens for one, and outside of `failing_together`.
        broadcast: returns on every process what the first one gives.
        started: processes that this one has started, by rank.

    Raises:
        ConnectionError: the first process cannot be reached.
    """
    if world_size == 1 or not _State.inside or _State.peers is not None:
        return
    if rank == 0:
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        server, token = _listen(address), secrets.token_hex(16)
        broadcast([address, server.getsockname()[1], token])
        with server:
            connections = _accept(server, world_size - 1, token)
    else:
        host, port, token = broadcast(None)
        connection = socket.create_connection((host, port), timeout=JOIN_SECONDS)
        _send(connection, {"token": token, "rank": rank})
        connections = {0: connection}
    for connection in connections.values():
        _keep_alive(connection)
    peers = _Peers(rank, world_size, connections, started)
    for other, connection in connections.items():
        threading.Thread(target=_watch, args=(peers, other, connection), name=f"peer {other}", daemon=True).start()
    _State.peers, _State.connected = peers, True


def _listen(address: str) -> socket.socket:
    try:
        return socket.create_server((address, 0))
    except OSError:  # an address that other machines know this one by
        return socket.create_server(("", 0))


def _accept(server: socket.socket, count: int, token: str) -> dict[int, socket.socket]:
    connections: dict[int, socket.socket] = {}
    server.settimeout(JOIN_SECONDS)
    while len(connections) < count:
        connection, _ = server.accept()
        connection.settimeout(JOIN_SECONDS)
        greeting = _receive(connection)
        if greeting is None or greeting.get("token") != token:  # somebody else
            connection.close()
            continue
        connections[int(greeting["rank"])] = connection
    return connections


def _keep_alive(connection: socket.socket) -> None:
    """Notice within half a minute that the other machine is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if option in vars(socket):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, vars(socket)[option], value)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """Return the next line of a connection; None at its end."""
    line = b""
    try:
        while not line.endswith(b"\n"):
            byte = connection.recv(1)
            if not byte:
                return None
            line += byte
        message: dict[str, Any] = json.loads(line)
    except (OSError, ValueError):
        return None
    return message


def _watch(peers: _Peers, other: int, connection: socket.socket) -> None:
    message = _receive(connection)
    try:
        if peers.leaving or peers.failure is not None or (message is not None and message.get("done")):
            return
        peers.failure = _failure(message, f"process {other} of {peers.world_size}", peers.started.get(other))
        print(f"error: {peers.failure}. {HINT}", file=sys.stderr, flush=True)
        for rank, each in peers.connections.items() if peers.rank == 0 else ():
            if rank != other:
                _send(each, {"passed_on": peers.failure})
    finally:
        peers.heard.set()
    time.sleep(PATIENCE_SECONDS)
    os._exit(FAILED)


def _failure(message: dict[str, Any] | None, name: str, process: subprocess.Popen[bytes] | None) -> str:
    if message is not None:
        return str(message.get("passed_on") or f"{name} failed: {message.get('failed')}")
    if process is None:
        return f"{name} was killed"
    try:
        code = process.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{name} has closed its connection"
    return f"{name} was killed by {signal.Signals(-code).name}" if code < 0 else f"{name} ended with exit code {code}"


def report_failure(error: BaseException) -> None:
    """Tell the other processes why this one fails; nothing if one of them has failed before.

    A library may now wait for the others in its clean-up: this process ends soon in any case.
    """
    peers = _State.peers
    if peers is None or peers.leaving or _other_failed(peers):
        return
    peers.leaving = True
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    for connection in peers.connections.values():
        _send(connection, {"failed": text})
    timer = threading.Timer(5 * PATIENCE_SECONDS, os._exit, (FAILED,))
    timer.daemon = True
    timer.start()


def _other_failed(peers: _Peers) -> bool:
    """Return whether another process has failed; an error of a collective may arrive a moment before the message."""
    peers.heard.wait(1.0)
    return peers.failure is not None


@contextmanager
def failing_together() -> Iterator[None]:
    """End the work inside with the others of its run: a failure is told to them, a failure of theirs ends it.

    Raises:
        SystemExit: another process has failed, and what the work inside raises is a consequence.
    """
    _State.inside = True
    try:
        yield
    except BaseException as error:
        report_failure(error)
        peers = _State.peers
        if peers is not None and peers.failure is not None:
            raise SystemExit(FAILED) from error
        if peers is not None and peers.rank:
            peers.heard.wait(2 * PATIENCE_SECONDS)  # Lightning kills the first process soon after this one ends
        raise
    else:
        for connection in _State.peers.connections.values() if _State.peers is not None else ():
            _send(connection, {"done": True})
    finally:
        if _State.peers is not None:
            _State.peers.leaving = _State.peers.failure is None
        _State.inside, _State.peers = False, None


def end_with_starter(rank: int) -> None:
    """End this process when the one that has started it ends; only for processes that Lightning starts.

    Args:
        rank: of this process; the first one leaves its number for those that it will start.
    """
    if rank == 0:
        os.environ[STARTED_BY] = str(os.getpid())
    elif os.environ.get(STARTED_BY) == str(os.getppid()):
        threading.Thread(target=_watch_starter, args=(os.getppid(),), name="starter", daemon=True).start()


def _watch_starter(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(1.0)
    time.sleep(PATIENCE_SECONDS)
    if _State.connected:  # it was killed, which its connection has told, or it has finished before this process
        return
    print(f"error: process {starter}, which started this one, has ended. {HINT}", file=sys.stderr, flush=True)
    os._exit(FAILED)
