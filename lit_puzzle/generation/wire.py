"""The connection between a run and a rollout server: JSON messages and files over TCP, after each has proved its key.

    message     one frame of JSON; nothing that is received is unpickled or run
    file        frames of `CHUNK_BYTES` at most, after a message that says how many bytes there are
    key         K, the same on both sides. Client and server send random numbers Nc and Ns, then
                HMAC-SHA256(K, "client" Nc Ns) and, once that is right, HMAC-SHA256(K, "server" Nc Ns):
                32 bytes each, without frames, all within `HANDSHAKE_SECONDS`
    deadline    any time may pass between messages; inside a message or a file nothing may stand still for
                `STALLED_SECONDS`, in either direction

The key itself never travels; what follows is not encrypted: a private network, or a tunnel, is needed. Reads key and
addresses from environment variables; writes nothing.
"""

import hmac
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

KEY = "LIT_PUZZLE_ROLLOUT_KEY"  # environment variable
SERVERS = "LIT_PUZZLE_ROLLOUT_SERVERS"  # environment variable: where they run is no part of an experiment
KEY_CHARACTERS = 16  # fewest of a key
CHUNK_BYTES = 64 * 2**20
MESSAGE_BYTES = 2**30  # largest message
PROOF_BYTES, HANDSHAKE_SECONDS = 32, 10.0
TOO_LARGE = "a message has more than {:,} bytes. Generate for fewer or shorter prompts at a time, or by more servers."
SAME_VERSION = "Give run and server the same version of lit_puzzle."
DEAD_AFTER_MS = 60_000  # without an answer of the other machine
STALLED_SECONDS = 60.0  # in which no byte of a begun message or file moves: the other side has stopped
ASKED_AFTER, ASKED_EVERY, ASKED = 20, 10, 4  # seconds of silence after which a machine is asked whether it is there


def key_from_environment() -> bytes:
    """Return the key.

    Raises:
        ValueError: there is none, or a short one.
    """
    key = os.environ.get(KEY, "")
    if len(key) < KEY_CHARACTERS:
        raise ValueError(
            f"{KEY} has {len(key)} characters; a rollout server and its runs need the same key of at least "
            f"{KEY_CHARACTERS}: export {KEY}=$(openssl rand -hex 32)"
        )
    return key.encode()


def host_and_port(address: str) -> tuple[str, int]:
    """Return host and port of an address.

    Raises:
        ValueError: it is not HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 <= int(port) < 2**16:
        raise ValueError(f"The address of a rollout server is HOST:PORT, 10.0.0.7:5005 for example; got {address!r}.")
    return host.strip("[]"), int(port)


def servers_from_environment() -> list[str]:
    """Return the addresses of the rollout servers.

    Raises:
        ValueError: there are none, one is named twice, or one is not HOST:PORT.
    """
    servers = os.environ.get(SERVERS, "").replace(",", " ").split()
    if not servers or len(set(servers)) < len(servers):
        raise ValueError(
            f"{SERVERS} is {' '.join(servers)!r}; rollouts.engine: server needs the addresses of rollout servers, each "
            f"once: export {SERVERS}=10.0.0.7:5005,10.0.0.8:5005"
        )
    for address in servers:
        host_and_port(address)
    return servers


class Wire:
    """One end of a connection.

    Args:
        stream: connected socket, which this object takes over.
    """

    def __init__(self, stream: socket.socket) -> None:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, ASKED_AFTER)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, ASKED_EVERY)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, ASKED)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER_MS)
        stream.settimeout(None)
        seconds, rest = divmod(STALLED_SECONDS, 1)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            stream.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(seconds), int(rest * 1e6)))
        self.connection = Connection(stream.detach())

    def prove(self, key: bytes, is_server: bool) -> bool:
        """Return whether the other side knows the key, to which it is proved that this side does.

        Raises:
            OSError: the connection ended, which is what a server does to a wrong key; or the other side needs longer
                than `HANDSHAKE_SECONDS` in all.
        """
        until = time.monotonic() + HANDSHAKE_SECONDS
        own = secrets.token_bytes(PROOF_BYTES)
        os.write(self.connection.fileno(), own)
        other = self._proof(until)
        both = other + own if is_server else own + other
        client, server = (hmac.digest(key, role + both, "sha256") for role in (b"client", b"server"))
        if is_server:
            if not hmac.compare_digest(self._proof(until), client):
                return False
            os.write(self.connection.fileno(), server)
            return True
        os.write(self.connection.fileno(), client)
        return hmac.compare_digest(self._proof(until), server)

    def _proof(self, until: float) -> bytes:
        proof = b""
        while len(proof) < PROOF_BYTES:
            if not self.connection.poll(max(until - time.monotonic(), 0)):
                raise TimeoutError("no proof of the key")
            read = os.read(self.connection.fileno(), PROOF_BYTES - len(proof))
            if not read:
                raise ConnectionError("ended")
            proof += read
        return proof

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message.

        Raises:
            OSError: the connection has ended, or the other side reads nothing for `STALLED_SECONDS`.
        """
        self.connection.send_bytes(json.dumps(message, separators=(",", ":")).encode())

    def receive(self) -> Any:
        """Return the next message, which may take any time to begin.

        Raises:
            EOFError: the other side has ended the connection.
            OSError: the connection failed, or the message stopped in its middle.
            ValueError: it is no JSON, or too large.
        """
        self.connection.poll(None)
        message = self._frame(MESSAGE_BYTES, TOO_LARGE.format(MESSAGE_BYTES))
        try:
            return json.loads(message)
        except (ValueError, RecursionError):
            raise ValueError(f"a message is no JSON. {SAME_VERSION}") from None

    def _frame(self, max_bytes: int, otherwise: str) -> bytes:
        try:
            return self.connection.recv_bytes(max_bytes)
        except OSError:
            if self.connection.readable:
                raise
            raise ValueError(otherwise) from None  # a longer one is not read, and ends the reading

    def send_file(self, path: Path) -> None:
        """Send the bytes of a file."""
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                self.connection.send_bytes(chunk)

    def receive_file(self, file: BinaryIO, num_bytes: int) -> None:
        """Write so many bytes, which the other side sends, into a file.

        Raises:
            EOFError: the other side has ended the connection.
            OSError: the connection failed, or the file stopped in its middle.
            ValueError: there are more bytes.
        """
        file.seek(0)
        while num_bytes > 0:
            chunk = self._frame(min(CHUNK_BYTES, num_bytes), f"a file is not as announced. {SAME_VERSION}")
            file.write(chunk)
            num_bytes -= len(chunk)
        file.truncate()
        file.flush()

    def close(self) -> None:
        """End the connection."""
        self.connection.close()


def connect(address: str, seconds: float) -> Wire:
    """Return a connection to an address, which may take some seconds to be there.

    Raises:
        OSError: it is not there.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            return Wire(socket.create_connection(host_and_port(address), timeout=HANDSHAKE_SECONDS))
        except OSError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.2)
