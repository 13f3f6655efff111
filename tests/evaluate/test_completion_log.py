"""completion_log.py: completions are written as they end; what a killed evaluation had is not asked for again."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.completion_server import Answer, Server, completion, running_servers

from lit_puzzle.evaluate.accuracy import read_episodes
from lit_puzzle.evaluate.completion_log import generate_missing, read_log
from lit_puzzle.generation.load import load_engine
from lit_puzzle.generation.sampling import EngineSettings, Sampling, ServerSettings
from lit_puzzle.run.folder import PACKAGE, is_complete

PARENT = PACKAGE / "assets" / "tiny_parent"
PROBLEMS = 3 * 6  # of the evaluations here
REPOSITORY = PACKAGE.parent


@pytest.fixture
def start() -> Iterator[Callable[[Answer], Server]]:
    with running_servers() as begin:
        yield begin


def begin_evaluation(server: Server, run_dir: Path, concurrency: int) -> subprocess.Popen[str]:
    settings = f"{{url: {server.url}, concurrency: {concurrency}, retries: 1}}"
    words = [f"--run_dir={run_dir}", "--engine.name=server", f"--engine.server={settings}"]
    words += [f"--held_out.prompts_per_effort={PROBLEMS // 3}", "--held_out.block_size=12"]
    command = [sys.executable, "-m", "lit_puzzle", "run", str(REPOSITORY / "recipes" / "evaluate.yaml"), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True)


def test_a_killed_evaluation_of_a_server_asks_only_for_what_is_missing(start: Any, tmp_path: Path) -> None:
    """kill -9 while requests are out, in the second block; a block of 12 was finished before."""
    process: list[subprocess.Popen[str]] = []

    def kills_at_16(request: dict[str, Any], times: int) -> tuple[int, Any]:
        if len(server.requests) == 16:
            os.kill(process[0].pid, signal.SIGKILL)
            process[0].wait()
        return 200, completion(request)

    server = start(kills_at_16)
    process.append(begin_evaluation(server, tmp_path / "killed", 1))
    _, err = process[0].communicate(timeout=600)
    assert process[0].returncode == -signal.SIGKILL, err
    logs = [*(tmp_path / "killed" / "blocks").glob("*.completions.jsonl")]
    assert [len(log.read_text().splitlines()) for log in logs] == [3] and not is_complete(tmp_path / "killed")
    resumed = begin_evaluation(server, tmp_path / "killed", 1)
    _, err = resumed.communicate(timeout=600)
    assert resumed.returncode == 0 and is_complete(tmp_path / "killed"), err
    assert len(server.requests) == PROBLEMS + 1  # the one that was out when the process was killed, twice
    assert sorted(server.sent.values()) == [1] * (PROBLEMS - 1) + [2]
    episodes = read_episodes(tmp_path / "killed")
    assert [episode.row for episode in episodes] == list(range(PROBLEMS))
    whole = begin_evaluation(start(lambda request, times: (200, completion(request))), tmp_path / "whole", 8)
    _, err = whole.communicate(timeout=600)
    assert whole.returncode == 0 and read_episodes(tmp_path / "whole") == episodes, err


def test_what_ended_before_a_server_failed_is_not_asked_for_again(start: Any, tmp_path: Path) -> None:
    prompts, rows, log = [[1, 8, 3, 13, number] for number in range(14, 20)], range(40, 46), tmp_path / "log.jsonl"
    broken = [True]

    def fails_at_the_fourth(request: dict[str, Any], times: int) -> tuple[int, Any]:
        fails = broken[0] and request["prompt"] == prompts[3]
        return (400, {"error": "no"}) if fails else (200, completion(request))

    server = start(fails_at_the_fourth)
    engine = load_engine(EngineSettings("server", server=ServerSettings(server.url, concurrency=1, retries=0)), PARENT)
    with pytest.raises(ValueError, match="did not answer prompt 43"):
        generate_missing(engine, prompts, Sampling(4), rows, log)
    assert sorted(read_log(log, rows)) == [40, 41, 42]
    broken[0] = False
    completions = generate_missing(engine, prompts, Sampling(4), rows, log)
    assert [done.token_ids for done in completions] == [[*prompt[-2:], 2] for prompt in prompts]
    assert server.sent == {str(prompt): 1 for prompt in prompts} | {str(prompts[3]): 2}
    assert generate_missing(engine, prompts, Sampling(4), rows, log) == completions and len(server.requests) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": 3}, r"log\.jsonl:2: this is no completion of the block: row 3"),
        ({"token_ids": []}, "no completion"),
        ({"token_ids": [True]}, "no completion"),
        ({"finish": "abort"}, "finish abort.*Remove .*log.jsonl, and run the same command again"),
        ({"seconds": "1"}, "no completion"),
        ({"more": 1}, r"log\.jsonl:2: unknown key"),
    ],
)
def test_a_damaged_log_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    log, line = tmp_path / "log.jsonl", {"row": 7, "token_ids": [5, 2], "finish": "stop", "seconds": None}
    log.write_text(json.dumps(line | {"row": 8}) + "\n" + json.dumps(line | change) + "\n" + '{"row": 9, ')
    with pytest.raises(ValueError, match=message) as error:
        read_log(log, [7, 8, 9])
    assert "\n" not in str(error.value)
