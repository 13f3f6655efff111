"""A little server of OpenAI's interface, for tests: it answers as it is told, and counts what it was asked."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], tuple[int, Any]]


class Server(ThreadingHTTPServer):
    """Answers each request with `answer(request, number of times that this prompt was sent)`; a text is sent as HTML.

    `models` is what it answers to the question for its models.
    """

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.sent, self.requests = answer, Counter[str](), list[dict[str, Any]]()
        self.models: Any = {
            "object": "list",
            "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}],
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.reply(200, self.server.models)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = str(request["prompt"])
        self.server.sent[prompt] += 1
        self.server.requests.append(request)
        self.reply(*self.server.answer(request, self.server.sent[prompt]))

    def reply(self, status: int, content: Any) -> None:
        text = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        body = content if isinstance(content, bytes) else text
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
        self.send_header("Retry-After-Ms", "1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(BrokenPipeError):  # whoever did not wait for it
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def completion(request: dict[str, Any], **changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": [*request["prompt"][-2:], 2]}
    usage = {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9}
    answer = {"id": "1", "object": "text_completion", "created": 0, "model": "m", "usage": usage}
    return answer | {"choices": [choice | changes]}


@contextmanager
def running_servers() -> Iterator[Callable[[Answer], Server]]:
    """Yield what starts a server with its answers; all of them end with the `with` statement."""
    servers: list[Server] = []

    def begin(answer: Answer) -> Server:
        servers.append(Server(answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    try:
        yield begin
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
