"""The connection to a rollout server: addresses, proofs of the key, messages and files."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest
from helpers.server_messages import pair

import lit_puzzle.generation.wire as wire
from lit_puzzle.generation.wire import (
    KEY,
    SERVERS,
    host_and_port,
    key_from_environment,
    servers_from_environment,
)


def test_a_machine_that_has_gone_is_noticed_within_a_minute() -> None:
    """Also while nothing is under way: the system's own default is two hours."""
    for end in pair():
        with socket.fromfd(end.connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as stream:
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            idle, every, times = (stream.getsockopt(socket.IPPROTO_TCP, option) for option in options)
            assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and idle + every * times <= 60
        end.close()


@pytest.mark.parametrize("address", ["", "host", "host:", ":5005", "host:x", "host:-1", "host:65536", "host:1.5"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match=r"is HOST:PORT, 10\.0\.0\.7:5005 for example"):
        host_and_port(address)


def test_addresses() -> None:
    assert host_and_port("gpu7.cluster:5005") == ("gpu7.cluster", 5005)
    assert host_and_port("[fe80::1]:80") == ("fe80::1", 80)


@pytest.mark.parametrize("given", ["", " , ", "a:1,a:1", "a:1 b"])
def test_servers_that_are_none(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVERS, given)
    with pytest.raises(ValueError, match=f"{SERVERS} is .* each once: export {SERVERS}=|is HOST:PORT"):
        servers_from_environment()


def test_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVERS, "a:1, b:2 c:3")
    assert servers_from_environment() == ["a:1", "b:2", "c:3"]


def test_a_key_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(ValueError, match=f"{KEY} has 0 characters; .* at least 16: export {KEY}="):
        key_from_environment()
    monkeypatch.setenv(KEY, "0123456789abcdef")
    assert key_from_environment() == b"0123456789abcdef"


@pytest.mark.parametrize(("keys", "expected"), [((b"one", b"one"), [True, True]), ((b"one", b"two"), [False])])
def test_both_sides_prove_the_key(keys: tuple[bytes, bytes], expected: list[bool]) -> None:
    client, server = pair()
    found: list[bool] = []

    def serve() -> None:
        found.append(server.prove(keys[1], is_server=True))
        if not found[0]:
            server.close()

    thread = threading.Thread(target=serve)
    thread.start()
    if all(expected):
        found.append(client.prove(keys[0], is_server=False))
    else:
        with pytest.raises(ConnectionError, match=r"ended|reset"):
            client.prove(keys[0], is_server=False)
    thread.join(10)
    assert found == expected


def test_a_server_that_only_repeats_what_it_hears_has_not_proved_the_key() -> None:
    client, server = pair()

    def repeat() -> None:
        for _ in range(2):
            os.write(server.connection.fileno(), os.read(server.connection.fileno(), 32))

    thread = threading.Thread(target=repeat)
    thread.start()
    assert not client.prove(b"one", is_server=False)
    thread.join(10)


@pytest.mark.parametrize("is_server", [True, False])
@pytest.mark.parametrize("every_seconds", [None, 0.05])
def test_the_proofs_have_one_deadline(
    is_server: bool, every_seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the other side sends a few bytes and stops, or one byte now and then."""
    monkeypatch.setattr(wire, "HANDSHAKE_SECONDS", 0.5)
    own, other = pair()
    said: list[str] = []

    def prove() -> None:
        with pytest.raises(TimeoutError, match="no proof of the key") as caught:
            own.prove(b"one", is_server)
        said.append(str(caught.value))

    thread = threading.Thread(target=prove, daemon=True)
    thread.start()
    os.write(other.connection.fileno(), b"\0\0\0\x20abc")
    until = time.monotonic() + 1.5
    while every_seconds and time.monotonic() < until:
        os.write(other.connection.fileno(), b"x")
        time.sleep(every_seconds)
    thread.join(1.5)
    assert said and not thread.is_alive()


def test_messages_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "CHUNK_BYTES", 7)
    client, server = pair()
    sent, got = tmp_path / "sent", tmp_path / "got"
    sent.write_bytes(bytes(range(100)))
    client.send({"number": 2**64 - 1, "real": 0.1 + 0.2})
    client.send_file(sent)
    client.send({"next": None})
    assert server.receive() == {"number": 2**64 - 1, "real": 0.1 + 0.2}
    with got.open("w+b") as file:
        file.write(bytes(300))  # what was there before ends
        server.receive_file(file, 100)
    assert got.read_bytes() == sent.read_bytes()
    assert server.receive() == {"next": None}
    client.close()
    with pytest.raises(EOFError):
        server.receive()


@pytest.mark.parametrize("sent", [b"\0", b"\0\0\0\x20{"])
def test_a_message_that_stops_in_its_middle(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "STALLED_SECONDS", 0.2)
    client, server = pair()
    os.write(client.connection.fileno(), sent)
    with pytest.raises(BlockingIOError):
        server.receive()


def test_who_reads_nothing_ends_the_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "STALLED_SECONDS", 0.2)
    client, server = pair()
    with pytest.raises(BlockingIOError):
        server.send({"large": "x" * 10**8})
    client.close()


def test_a_file_that_is_longer_than_announced_is_refused(tmp_path: Path) -> None:
    client, server = pair()
    (tmp_path / "sent").write_bytes(bytes(100))
    client.send_file(tmp_path / "sent")
    with (tmp_path / "got").open("w+b") as file, pytest.raises(ValueError, match="a file is not as announced"):
        server.receive_file(file, 99)


@pytest.mark.parametrize("sent", [b"", b"\xff{", b"{", b"[" * 10**5], ids=["empty", "bytes", "cut", "deep"])
def test_what_is_no_message(sent: bytes) -> None:
    client, server = pair()
    client.connection.send_bytes(sent)
    with pytest.raises(ValueError, match="a message is no JSON"):
        server.receive()


def test_a_message_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MESSAGE_BYTES", 10)
    client, server = pair()
    client.send({"a": 1000})
    assert server.receive() == {"a": 1000}
    client.send({"a": 10000})
    with pytest.raises(ValueError, match="more than 10 bytes"):
        server.receive()
