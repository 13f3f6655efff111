"""A server of OpenAI's interface: order, requests, failures that are retried or end it; and real vLLM serving."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.completion_server import Answer, Server, completion, running_servers
from helpers.vllm_environment import PYTHON, needs_vllm

from lit_puzzle.generation.engine import Completion
from lit_puzzle.generation.load import load_engine
from lit_puzzle.generation.sampling import EngineSettings, Sampling, ServerSettings
from lit_puzzle.run.folder import PACKAGE
from lit_puzzle.serve.vllm.check_server import serving

PARENT = PACKAGE / "assets" / "tiny_parent"
PROMPTS = [[1, 8, 3, 13, 14 + n % 7, 20 + n % 5] for n in range(11)]
GREEDY = Sampling(12, temperature=0.0)


def stalls(request: dict[str, Any], times: int) -> tuple[int, Any]:
    time.sleep(3)
    return 200, completion(request)


@pytest.fixture
def start() -> Iterator[Callable[[Answer], Server]]:
    with running_servers() as begin:
        yield begin


def settings(server: Server, **more: Any) -> EngineSettings:
    return EngineSettings("server", server=ServerSettings(server.url, **more))


def test_completions_come_in_order_and_each_request_says_all(start, monkeypatch):
    def slow_first(request: dict[str, Any], _: int) -> tuple[int, Any]:
        time.sleep(0.2 if request["prompt"] == PROMPTS[0] else 0.0)
        return 200, completion(request)

    server = start(slow_first)
    found = load_engine(settings(server, concurrency=4), PARENT).generate(PROMPTS, Sampling(7, 0.6, 0.95, seed=3))
    assert [done.token_ids for done in found] == [[*prompt[-2:], 2] for prompt in PROMPTS]
    assert all(done.finish == "stop" and done.seconds is not None for done in found)
    sent = server.requests[0]
    assert (sent["max_tokens"], sent["temperature"], sent["top_p"], sent["model"]) == (7, 0.6, 0.95, "m")
    assert (sent["top_k"], sent["repetition_penalty"], sent["skip_special_tokens"]) == (0, 1.0, False)
    assert len({request["seed"] for request in server.requests}) == len(PROMPTS)


def test_failures_are_retried_and_counted_once(start):
    def fails_twice(request: dict[str, Any], times: int) -> tuple[int, Any]:
        return (200, completion(request)) if times == 3 else ((500, {}), (429, {"error": "busy"}))[times - 1]

    server = start(fails_twice)
    found = load_engine(settings(server, retries=2), PARENT).generate(PROMPTS, GREEDY)
    assert len(found) == len(PROMPTS) and set(server.sent.values()) == {3}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda request, times: (500, {"error": "out of memory"}),
            r"did not answer prompt \d+: InternalServerError.*out of",
        ),
        (lambda request, times: (400, {"error": "no such field"}), "BadRequestError.*no such field"),
        (lambda request, times: (200, {"choices": []}), "without token ids or an end"),
        (lambda request, times: (200, completion(request, token_ids=None)), "must know return_token_ids"),
        (lambda request, times: (200, completion(request, finish_reason="abort")), "finish_reason 'abort'"),
        (lambda request, times: (200, completion(request, token_ids=[-1, 2])), "2 tokens, -1 among them"),
        (lambda request, times: (200, completion(request, token_ids=[1.7, 2])), r"2 tokens, 1\.7 among them"),
        (lambda request, times: (200, completion(request, token_ids=[10**9, 2])), "2 tokens, 1000000000 among them"),
        (lambda request, times: (200, completion(request, token_ids=[3] * 13)), "13 tokens: that is no completion"),
        (lambda request, times: (200, completion(request, finish_reason="length")), "cut its answer .* after 3 tokens"),
        (lambda request, times: (200, [1]), "without token ids or an end"),
        (lambda request, times: (200, b"{"), "did not answer|without token ids"),
        (stalls, "APITimeoutError.*same command"),
    ],
    ids=[
        *("error", "refusal", "no choice", "no ids", "aborted", "negative", "fraction", "outside", "longer", "shorter"),
        *("list", "damaged", "stalls"),
    ],
)
def test_what_ends_it_is_one_line(start, answer, message):
    engine = load_engine(settings(start(answer), retries=1, request_seconds=0.5), PARENT)
    with pytest.raises(ValueError, match=message) as error:
        engine.generate(PROMPTS[:3], GREEDY)
    assert "\n" not in str(error.value)


def test_what_fails_beside_the_server_keeps_its_name(start):
    def full(row: int, done: Completion) -> None:
        raise OSError(28, "No space left on device")

    engine = load_engine(settings(start(lambda request, times: (200, completion(request)))), PARENT)
    with pytest.raises(OSError, match="No space left on device"):
        engine.generate(PROMPTS[:3], GREEDY, on_completion=full)


def test_another_model_and_no_server(start):
    with pytest.raises(ValueError, match=r"serves \['m'\]; engine\.server\.model is other"):
        load_engine(settings(start(lambda request, times: (500, {})), model="other"), PARENT)
    with pytest.raises(ValueError, match="does not list its models: APIConnectionError"):
        load_engine(EngineSettings("server", server=ServerSettings("http://127.0.0.1:1/v1", retries=0)), PARENT)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "server"}, "without engine.server"),
        ({"name": "vllm", "server": ServerSettings("http://a/v1")}, "with engine.server"),
        ({"name": "server", "server": ServerSettings("http://a/v1"), "data_parallel": 2}, "several engines"),
    ],
)
def test_settings_that_contradict_themselves(given, message):
    with pytest.raises(ValueError, match=message):
        EngineSettings(**given)
    with pytest.raises(ValueError, match="begins with http"):
        ServerSettings("localhost:8000")


@needs_vllm
@pytest.mark.slow
def test_a_real_server_gives_the_completions_of_transformers(tmp_path: Path) -> None:
    expected = load_engine(EngineSettings("transformers"), PARENT).generate(PROMPTS, GREEDY)
    options = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**28)]
    with serving(PYTHON, PARENT, options, tmp_path / "server.log", 600) as port:
        engine = load_engine(EngineSettings("server", server=ServerSettings(f"http://127.0.0.1:{port}/v1")), PARENT)
        assert engine.generate(PROMPTS, GREEDY) == expected
        sampled = [engine.generate(PROMPTS, Sampling(12, seed=seed)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
