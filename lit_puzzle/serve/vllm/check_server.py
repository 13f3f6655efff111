"""Starts `vllm serve FOLDER` in vLLM's environment and asks it over HTTP, as a user's client would.

Reads a checkpoint folder; writes the server's log. The server listens on this machine alone, on a free port, and is
ended with all its processes.
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

from lit_puzzle.serve.vllm.check_reference import Reference
from lit_puzzle.serve.vllm.driver import ENVIRONMENT
from lit_puzzle.serve.vllm.report import Check, judged

HOST = "127.0.0.1"


@contextlib.contextmanager
def serving(python: Path, folder: Path, options: Sequence[str], log: Path, patience_seconds: float) -> Iterator[int]:
    """A running server's port.

    Raises:
        ValueError: The server ended, or did not answer within `patience_seconds`; shows the end of its log.
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
            state = f"ended with code {server.returncode}" if server.poll() is not None else "did not answer in time"
            raise ValueError(f"vllm serve {state}; the end of {log}:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            if ask(port, "GET", "/health")[0] == 200:
                return
        time.sleep(0.5)


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends the server and its engine: gently, then not."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, ending)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)


def ask(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """HTTP status and text of one request."""
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    try:
        connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def check_server(port: int, question: str, reference: Reference, exact: bool) -> list[Check]:
    """Asks a running server.

    Args:
        port: Where it listens.
        question: What the chats of `reference` ask.
        reference: What transformers answers.
        exact: Whether answers must be transformers' token for token (float32), or only come and end.
    """
    tokens = max(len(answer) for answer in reference.chat_answers.values())
    model = json.loads(ask(port, "GET", "/v1/models")[1])["data"][0]["id"]
    request = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": tokens,
        "skip_special_tokens": False,
    }
    return [
        _answers(port, request, reference, exact),
        _streams(port, request, reference),
        _stops(port, request, reference),
        _refuses(port, request),
    ]


def _chat(port: int, request: dict[str, Any], **more: Any) -> dict[str, Any]:
    status, text = ask(port, "POST", "/v1/chat/completions", request | more)
    if status != 200:
        raise ValueError(f"vllm serve answered a chat request with status {status}: {text}")
    return json.loads(text)


def _answers(port: int, request: dict[str, Any], reference: Reference, exact: bool) -> Check:
    same_prompt = same_answer = 0
    for effort, prompt in reference.chats.items():
        answer = _chat(port, request, reasoning_effort=effort, return_token_ids=True)
        same_prompt += answer["prompt_token_ids"] == prompt
        same_answer += answer["choices"][0]["token_ids"] == reference.chat_answers[effort]
    efforts = len(reference.chats)
    return judged(
        "server_answers",
        same_prompt == efforts and (same_answer == efforts or not exact),
        f"of {efforts} efforts, {same_prompt} prompts rendered as the tokenizer does, {same_answer} answers token for "
        "token transformers'",
        prompts_equal=same_prompt / efforts,
        answers_equal=same_answer / efforts,
    )


def _streams(port: int, request: dict[str, Any], reference: Reference) -> Check:
    effort = max(reference.chat_answers, key=lambda effort: len(reference.chat_answers[effort]))
    whole = _chat(port, request, reasoning_effort=effort)["choices"][0]
    status, text = ask(port, "POST", "/v1/chat/completions", request | {"reasoning_effort": effort, "stream": True})
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    choices = [choice for event in events if event != "[DONE]" for choice in json.loads(event)["choices"]]
    said = "".join(choice["delta"].get("content") or "" for choice in choices)
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    passed = (
        status == 200
        and events[-1:] == ["[DONE]"]
        and said == (whole["message"]["content"] or "")
        and reasons == [whole["finish_reason"]]
    )
    return judged(
        "server_streams",
        passed,
        f"{len(choices)} pieces make {'the' if passed else 'another'} answer of one request",
        pieces=len(choices),
    )


def _stops(port: int, request: dict[str, Any], reference: Reference) -> Check:
    """Draws each end token, and one that is none, by a bias no logit outweighs."""
    wrong = []
    for token in [*reference.end_ids, reference.plain_id]:
        answer = _chat(port, request | {"max_tokens": 4}, logit_bias={str(token): 100})
        found = answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]
        if found != (("length", 4) if token == reference.plain_id else ("stop", 1)):
            wrong.append(f"{token}: {found}")
    return judged(
        "server_stops",
        not wrong,
        f"stops at {reference.end_ids} and nowhere else" if not wrong else f"not as it should at {'; '.join(wrong)}",
        stop_tokens=len(reference.end_ids),
    )


def _refuses(port: int, request: dict[str, Any]) -> Check:
    status, _ = ask(port, "POST", "/v1/chat/completions", request | {"reasoning_effort": "immense"})
    return judged("server_refuses", 400 <= status < 500, f"an unknown effort is answered by status {status}")
