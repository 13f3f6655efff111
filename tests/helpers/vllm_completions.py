"""Runs in vLLM's environment: completions of `lit_puzzle.generation.vllm_engine`, written as JSON.

VENV/bin/python vllm_completions.py JOB COMPLETIONS

JOB is JSON: the `checkpoint`, `options` of `vllm.LLM`, and `calls`, each with `prompts`, `sampling` and `rows`.
COMPLETIONS gets `calls`, a list for each call with [token ids, finish, log-probabilities] for each prompt; `preempted`,
how often the scheduler took a request's KV cache away; and how many worker processes there were `before` and `after`
the engine was dropped.
"""

import json
import os
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.vllm_engine import load_vllm
from lit_puzzle.serve.vllm.driver import ENVIRONMENT


def main(job_path: str, completions_path: str) -> None:
    os.environ.update(ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": "0|0"})  # of two tensor-parallel processes
    job = json.loads(Path(job_path).read_text())
    preempted = count_preemptions()
    engine = load_vllm(Path(job["checkpoint"]), EngineSettings("vllm"), job["options"])
    found: dict[str, Any] = {"calls": []}
    for call in job["calls"]:
        completions = engine.generate(call["prompts"], Sampling(**call["sampling"]), call["rows"])
        found["calls"].append([astuple(completion) for completion in completions])
    found["preempted"], found["before"] = len(preempted), workers()
    del engine
    found["after"] = workers()
    Path(completions_path).write_text(json.dumps(found))


def workers() -> int:
    """Return how many worker processes of vLLM are alive."""
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return sum("VLLM::Worker" in " ".join(child.cmdline()) for child in alive)


def count_preemptions() -> list[str]:
    """Return a list that gets the id of each request whose KV cache is taken away."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted: list[str] = []
    preempt = Scheduler._preempt_request

    def noted(self: Any, request: Any, *details: Any, **options: Any) -> None:
        preempted.append(request.request_id)
        preempt(self, request, *details, **options)

    Scheduler._preempt_request = noted
    return preempted


if __name__ == "__main__":
    main(*sys.argv[1:])
