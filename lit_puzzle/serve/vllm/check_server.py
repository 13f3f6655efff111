"""Start `vllm serve FOLDER` in vLLM's environment and check it over HTTP, as a client uses it.

Reads a checkpoint folder; writes the server's log. The server listens only on this machine, on a free port, and is
ended together with its child processes.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_puzzle.environments.environment import NO_EFFORT
from lit_puzzle.serve.vllm.check_reference import Reference
from lit_puzzle.serve.vllm.driver import ENVIRONMENT
from lit_puzzle.serve.vllm.report import Check, checked

HOST = "127.0.0.1"


@contextlib.contextmanager
def serving(python: Path, folder: Path, options: Sequence[str], log: Path, patience_seconds: float) -> Iterator[int]:
    """Run a server in the context; yield its port.

    Args:
        python: interpreter of vLLM's environment.
        folder: folder to be served.
        options: further options of `vllm serve`.
        log: file for the server's output.
        patience_seconds: longest time for the server to start.

    Raises:
        ValueError: the server ended, or did not respond within `patience_seconds`; shows the end of its log.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--host", HOST, "--port", str(port)]
    settings = {name: value for name, value in ENVIRONMENT.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as stream:
        server = subprocess.Popen(
            [*command, *options],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **settings},
            start_new_session=True,
        )
    try:
        _wait(server, port, log, patience_seconds)
        yield port
    finally:
        _end(server)


def _wait(server: subprocess.Popen[bytes], port: int, log: Path, patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    while True:
        if server.poll() is not None or time.monotonic() > deadline:
            state = f"ended with code {server.returncode}" if server.poll() is not None else "did not respond in time"
            raise ValueError(f"vllm serve {state}; the end of {log}:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            if send(port, "GET", "/health")[0] == 200:
                return
        time.sleep(0.5)


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and its engine with SIGTERM, then with SIGKILL."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, ending)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)


def send(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Send one request; return HTTP status and text."""
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    try:
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def check_server(port: int, question: str, reference: Reference, exact: bool) -> list[Check]:
    """Return the checks of a running server.

    Args:
        port: port of the server.
        question: question of the chats of `reference`.
        reference: completions of transformers.
        exact: whether completions must equal those of transformers (float32).
    """
    tokens = max(len(completion) for completion in reference.chat_completions.values())
    model = json.loads(send(port, "GET", "/v1/models")[1])["data"][0]["id"]
    request = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": tokens,
        "skip_special_tokens": False,
    }
    return [
        _check_completions(port, request, reference, exact),
        _check_streaming(port, request, reference),
        _check_stops(port, request, reference),
        _check_refusal(port, request),
    ]


def _chat(port: int, request: dict[str, Any]) -> dict[str, Any]:
    status, text = send(port, "POST", "/v1/chat/completions", request)
    if status != 200:
        raise ValueError(f"vllm serve responded to a chat request with status {status}: {text}")
    return json.loads(text)


def _at(effort: str) -> dict[str, str]:
    """Return what a request says of its reasoning effort."""
    return {} if effort == NO_EFFORT else {"reasoning_effort": effort}


def _check_completions(port: int, request: dict[str, Any], reference: Reference, exact: bool) -> Check:
    """Compare prompts and completions at each effort with those of the tokenizer and transformers."""
    same_prompt = same_completion = 0
    for effort, prompt in reference.chats.items():
        response = _chat(port, request | _at(effort) | {"return_token_ids": True})
        same_prompt += response["prompt_token_ids"] == prompt
        same_completion += response["choices"][0]["token_ids"] == reference.chat_completions[effort]
    efforts = len(reference.chats)
    return checked(
        "server_completions",
        same_prompt == efforts and (same_completion == efforts or not exact),
        f"of {efforts} efforts, {same_prompt} prompts equal the tokenizer's, {same_completion} completions equal those "
        "of transformers",
        {"prompts_equal": same_prompt / efforts, "completions_equal": same_completion / efforts},
    )


def _check_streaming(port: int, request: dict[str, Any], reference: Reference) -> Check:
    """Compare a streamed completion with the same completion in one response."""
    effort = max(reference.chat_completions, key=lambda effort: len(reference.chat_completions[effort]))
    request = request | _at(effort)
    whole = _chat(port, request)["choices"][0]
    status, text = send(port, "POST", "/v1/chat/completions", request | {"stream": True})
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    choices = [choice for event in events if event != "[DONE]" for choice in json.loads(event)["choices"]]
    streamed = "".join(choice["delta"].get("content") or "" for choice in choices)
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    passed = (
        status == 200
        and events[-1:] == ["[DONE]"]
        and streamed == (whole["message"]["content"] or "")
        and reasons == [whole["finish_reason"]]
    )
    reason = f"{len(choices)} chunks {'equal' if passed else 'differ from'} the completion in one response"
    return checked("server_streams", passed, reason, {"chunks": len(choices)})


def _check_stops(port: int, request: dict[str, Any], reference: Reference) -> Check:
    """Force each end token and one ordinary token by a logit bias; check where the completion ends."""
    wrong = []
    for token in [*reference.end_ids, reference.plain_id]:
        response = _chat(port, request | {"max_tokens": 4, "logit_bias": {str(token): 100}})
        found = response["choices"][0]["finish_reason"], response["usage"]["completion_tokens"]
        if found != (("length", 4) if token == reference.plain_id else ("stop", 1)):
            wrong.append(f"{token}: {found}")
    reason = f"stops at {reference.end_ids} and at no other token" if not wrong else f"wrong at {'; '.join(wrong)}"
    return checked("server_stops", not wrong, reason, {"stop_tokens": len(reference.end_ids)})


def _check_refusal(port: int, request: dict[str, Any]) -> Check:
    """Check that an unknown reasoning effort is refused."""
    status, _ = send(port, "POST", "/v1/chat/completions", request | {"reasoning_effort": "immense"})
    return checked("server_refuses", 400 <= status < 500, f"status {status} for an unknown effort", {"status": status})
