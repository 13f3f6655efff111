"""Rollouts by a server: the completions and weights of an engine beside the run; whoever does not belong is refused."""

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.local_engine import LocalEngine
from helpers.piped_engine import FATAL, STUCK, PipedEngine
from helpers.server_messages import GENERATE, LOAD
from helpers.vllm_environment import ROOT, needs_vllm, output_of, start_in_vllm
from torch import Tensor

import lit_puzzle.generation.rollout_engine as rollout_engine
import lit_puzzle.generation.rollout_server as rollout_server
import lit_puzzle.generation.wire as wire
from lit_puzzle.generation.ranks import Ranks
from lit_puzzle.generation.rollout_checks import check_rollouts
from lit_puzzle.generation.rollout_engine import RolloutEngine
from lit_puzzle.generation.rollout_server import RolloutServer
from lit_puzzle.generation.rollout_settings import RolloutSettings
from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.served_engine import ServedEngine, answer_of
from lit_puzzle.generation.wire import KEY, SERVERS, Wire, connect
from lit_puzzle.model.checkpoint import Checkpoint

CHILD = ROOT / "lit_puzzle" / "assets" / "tiny_child"
SECRET = "a key for the tests of servers"
PROMPTS, SAMPLING = [[1, 8, 3], [1, 9, 14, 20]], Sampling(8, seed=3, logprobs=True)
SERVED = RolloutSettings("server", engine_seconds=20)
NAME = "model.layers.1.self_attn.o_proj.weight"


@dataclass
class Changed:
    """A tensor of the child, moved by `step`."""

    base: Tensor
    step: float

    def value(self) -> Tensor:
        return self.base + self.step


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RolloutServer]:
    """A server in this process, whose engines are transformers' models in threads."""
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr(rollout_server, "vllm_process", PipedEngine)
    monkeypatch.setattr(rollout_server, "BUSY_SECONDS", 0.2)
    monkeypatch.setattr(PipedEngine, "started", [])
    server = RolloutServer("127.0.0.1:0", SECRET.encode())
    monkeypatch.setenv(SERVERS, server.address)
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield server
    server.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_server_generates_what_an_engine_beside_the_run_does(
    server: RolloutServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = RolloutEngine(SERVED, CHILD)
    monkeypatch.setattr(rollout_engine, "EngineProcess", LocalEngine)
    beside = RolloutEngine(RolloutSettings("vllm"), CHILD)
    tensor = Checkpoint(CHILD).read(NAME)
    found = []
    for step in (0.0, 0.1, 0.2):
        sent = [engine.update({NAME: Changed(tensor, step)}) for engine in (served, beside)]
        assert sent == [tensor.numel() * 4] * 2
        found.append(served.generate(PROMPTS, SAMPLING))
        assert found[-1] == beside.generate(PROMPTS, SAMPLING)
    assert found[0] != found[1] != found[2]
    served.read_folder(CHILD)
    assert served.generate(PROMPTS, SAMPLING, [2**64 - 1, 0]) != found[0]
    assert served.generate(PROMPTS, SAMPLING) == found[0]
    served.close()
    assert PipedEngine.started[0].has_ended.wait(10)


def test_every_run_starts_from_its_folder(server: RolloutServer) -> None:
    """What another run sent is gone with its engine."""
    first = RolloutEngine(SERVED, CHILD)
    expected = first.generate(PROMPTS, SAMPLING)
    first.update({NAME: Changed(Checkpoint(CHILD).read(NAME), 0.2)})
    assert first.generate(PROMPTS, SAMPLING) != expected
    first.close()
    assert RolloutEngine(SERVED, CHILD).generate(PROMPTS, SAMPLING) == expected


def test_one_run_at_a_time(server: RolloutServer) -> None:
    first = RolloutEngine(SERVED, CHILD)
    with pytest.raises(ValueError, match=r"The rollout server at 127\.0\.0\.1:\d+: it serves another run\. Wait"):
        RolloutEngine(SERVED, CHILD)
    assert len(first.generate(PROMPTS, SAMPLING)) == 2


def test_an_engine_ends_with_a_run_that_is_killed_in_a_rollout(server: RolloutServer) -> None:
    engine = RolloutEngine(SERVED, CHILD)
    assert isinstance(engine._engine, ServedEngine)
    engine._engine.send("generate", PROMPTS, replace(SAMPLING, max_new_tokens=STUCK), [0, 1])
    engine._engine.close()  # what the system does for a process that was killed
    assert PipedEngine.started[0].has_ended.wait(10)
    assert len(RolloutEngine(SERVED, CHILD).generate(PROMPTS, SAMPLING)) == 2


def test_an_engine_that_dies_is_one_line_and_the_next_run_gets_another(server: RolloutServer) -> None:
    engine = RolloutEngine(SERVED, CHILD)
    with pytest.raises(ValueError, match=r"rollout server at .*: vLLM of the server was killed by SIGKILL"):
        engine.generate(PROMPTS, replace(SAMPLING, max_new_tokens=FATAL))
    assert len(RolloutEngine(SERVED, CHILD).generate(PROMPTS, SAMPLING)) == 2


def test_an_engine_that_hangs_is_one_line(server: RolloutServer) -> None:
    engine = RolloutEngine(replace(SERVED, engine_seconds=0.5), CHILD)
    with pytest.raises(ValueError, match=r"has told nothing for 0\.5 seconds: it hangs"):
        engine.generate(PROMPTS, replace(SAMPLING, max_new_tokens=STUCK))


def test_who_does_not_know_the_key_gets_nothing(server: RolloutServer, monkeypatch: pytest.MonkeyPatch) -> None:
    host, _, port = server.address.partition(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(1000))
        monkeypatch.setenv(KEY, SECRET + "!")
        with pytest.raises(ValueError, match=f"has another {KEY}, or is something else"):
            RolloutEngine(SERVED, CHILD)
    assert PipedEngine.started == []
    monkeypatch.setenv(KEY, SECRET)
    assert len(RolloutEngine(SERVED, CHILD).generate(PROMPTS, SAMPLING)) == 2


def served_engine() -> ServedEngine:
    engine = ServedEngine(os.environ[SERVERS])
    engine.load(CHILD, "float32", 1.0, SERVED)
    assert engine.receive(20) is None
    return engine


@pytest.mark.parametrize(
    ("call", "values", "said"),
    [
        ("read_folder", {"folder": "/absent", "fingerprint": ""}, r"it does not see /absent\. A server reads"),
        ("read_folder", {"folder": str(CHILD), "fingerprint": "else"}, "the fingerprints differ"),
        ("rm", {"folder": "/"}, r"it was asked for \{'call': 'rm'.*same version of lit_puzzle"),
        ("read_folder", {}, r"missing key\(s\) \['folder', 'fingerprint'\]"),
        ("generate", {"prompts": [], "sampling": {"top": 1}, "rows": []}, r"Sampling: unknown key\(s\) \['top'\]"),
        ("read_trained", {"bytes": -1}, r"read_trained: bytes was -1\. Give run and server the same version"),
        ("read_trained", {"bytes": 10**18}, r"get 931,322,574\.6 GiB of weights; its machine has"),
        ("read_folder", {"folder": "a" * 300, "fingerprint": ""}, r"it cannot read a+ \(File name too long\)"),
        ("load", LOAD, "it was asked to load again"),
    ],
)
@pytest.mark.usefixtures("server")
def test_calls_that_are_refused(call: str, values: dict[str, Any], said: str) -> None:
    engine = served_engine()
    engine.wire.send({"call": call} | values)
    with pytest.raises(ValueError, match=said):
        engine.receive(20)
    served_engine().close()  # the next run is served


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"\xff{", r"a message is no JSON\. Give run and server the same version"),
        (b"[" * 10**5, "a message is no JSON"),
        (bytes(10**8), r"a message has more than 10,000,000 bytes\. Generate for fewer or shorter prompts"),
        (json.dumps(GENERATE).encode(), "it was asked to generate first"),
    ],
    ids=["bytes", "deep", "large", "early"],
)
@pytest.mark.usefixtures("server")
def test_who_has_the_key_and_sends_something_else(sent: bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MESSAGE_BYTES", 10**7)
    engine = ServedEngine(os.environ[SERVERS])
    with suppress(OSError):  # the server ends the connection before it has read all of a message that is too large
        engine.wire.connection.send_bytes(sent)
    with pytest.raises(ValueError, match=rf"The rollout server at 127\.0\.0\.1:\d+: {said}"):
        engine.receive(20)
    served_engine().close()  # the next run is served


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\1\0{"], ids=["weights", "length", "message"])
@pytest.mark.usefixtures("server")
def test_who_stops_in_a_message_loses_the_engine(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it has begun: a message's length, a message, or the weights that a message announced."""
    monkeypatch.setattr(wire, "STALLED_SECONDS", 0.3)
    engine = served_engine()
    if sent:
        os.write(engine.wire.connection.fileno(), sent)
    else:
        engine.wire.send({"call": "read_trained", "bytes": 100})
    assert PipedEngine.started[0].has_ended.wait(5)
    with pytest.raises(ValueError, match="has ended the connection"):
        engine.receive(20)
    served_engine().close()  # the next run is served


@pytest.mark.usefixtures("server")
def test_a_run_may_train_between_calls_for_longer_than_a_message_may_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "STALLED_SECONDS", 0.1)
    engine = served_engine()
    time.sleep(0.4)
    engine.send("generate", PROMPTS, SAMPLING, [0, 1])
    assert len(engine.receive(20)) == 2


def test_a_server_that_cannot_accept_a_run_tries_again(
    server: RolloutServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Here for want of open files, as in a process that has as many as it may."""
    monkeypatch.setattr(rollout_server, "RETRY_SECONDS", 0.1)
    host, _, port = server.address.partition(":")
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as visitor:
        resource.setrlimit(resource.RLIMIT_NOFILE, (visitor.fileno() + 1, most))
        try:
            visitor.connect((host, int(port)))  # the server waits with a file for this one
            time.sleep(0.5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    assert "no run can connect ([Errno 24] Too many open files); trying again" in capfd.readouterr().err
    assert len(RolloutEngine(SERVED, CHILD).generate(PROMPTS, SAMPLING)) == 2


@pytest.mark.usefixtures("server")
def test_a_call_before_the_last_one_is_answered() -> None:
    engine = served_engine()
    engine.send("generate", PROMPTS, replace(SAMPLING, max_new_tokens=STUCK), [0, 1])
    engine.send("generate", PROMPTS, SAMPLING, [0, 1])
    with pytest.raises(ValueError, match="it was sent a call before it had answered the last one"):
        engine.receive(20)


@pytest.mark.parametrize("said", [{"finished": [1]}, [], {"completion": [[1], "end", None, 1.0]}, {"done": 1}])
def test_a_server_of_another_version_is_one_line(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            other = Wire(listening.accept()[0])
            other.prove(SECRET.encode(), is_server=True)
            other.send(said)

        threading.Thread(target=serve, daemon=True).start()
        engine = ServedEngine(f"127.0.0.1:{listening.getsockname()[1]}")
        with pytest.raises(ValueError, match=r"told .*\. Give run and server the same version"):
            engine.receive(20)


def test_a_server_that_stands_still_while_it_gets_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr(wire, "STALLED_SECONDS", 0.3)
    (tmp_path / "weights").write_bytes(bytes(10**8))
    held = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            held.append(Wire(listening.accept()[0]))
            held[0].prove(SECRET.encode(), is_server=True)

        threading.Thread(target=serve, daemon=True).start()
        engine = ServedEngine(f"127.0.0.1:{listening.getsockname()[1]}")
        engine.send("read_trained", tmp_path / "weights")
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"The rollout server at .* it has read nothing of a message"):
            engine.receive(60)
        assert time.monotonic() - start < 30  # not told by its silence


def test_answers_together_may_be_larger_than_a_message(server: RolloutServer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = RolloutEngine(SERVED, CHILD)
    expected = engine.generate(PROMPTS * 20, SAMPLING)
    monkeypatch.setattr(wire, "MESSAGE_BYTES", 1000)
    assert sum(len(json.dumps(answer_of(completion))) for completion in expected) > 5000
    assert engine.generate(PROMPTS * 20, SAMPLING) == expected


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match="cannot be listened at"):
            RolloutServer(address, SECRET.encode())
    with pytest.raises(ValueError, match=r"cannot be reached .*rollout_server --address=127\.0\.0\.1:\d+"):
        ServedEngine(address, connect_seconds=0)


def test_an_address_in_brackets_is_one_of_ipv6() -> None:
    try:
        server = RolloutServer("[::1]:0", SECRET.encode())
    except ValueError as error:
        pytest.skip(str(error))  # a machine without IPv6
    threading.Thread(target=server.serve, daemon=True).start()
    assert server.address.startswith("[::1]:")
    connect(server.address, 0).close()
    server.close()


def test_what_is_checked_before_anything_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVERS, "a:1,b:1")
    monkeypatch.setenv(KEY, "short")
    with pytest.raises(ValueError, match=f"{KEY} has 5 characters"):
        check_rollouts(SERVED, CHILD, Ranks(size=2))
    monkeypatch.setenv(KEY, SECRET)
    check_rollouts(SERVED, CHILD, Ranks(size=4))
    with pytest.raises(ValueError, match="names 2; their number must divide the 3 processes"):
        check_rollouts(SERVED, CHILD, Ranks(size=3))


@needs_vllm
def test_a_server_of_vllm_generates_with_the_weights_that_were_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, SECRET)
    server = start_in_vllm("-m", "lit_puzzle.generation.rollout_server", "--address=127.0.0.1:0")
    try:
        assert server.stdout is not None
        monkeypatch.setenv(SERVERS, server.stdout.readline().split()[2])
        helper, results = ROOT / "tests" / "helpers" / "vllm_rollouts.py", tmp_path / "results.json"
        output_of(start_in_vllm(helper, CHILD, results, "server"))
    finally:
        server.kill()
        server.communicate()
    own, attention, router, again = json.loads(results.read_text())
    for found in (own, attention, router, again):
        same = sum(one == other for one, other in zip(found["tokens"], found["expected"], strict=True))
        assert same >= len(found["tokens"]) - 1 and found["largest_error"] < 5e-5
    assert attention["tokens"] != own["tokens"] and router["tokens"] != attention["tokens"]
    assert again["tokens"] == own["tokens"]
