"""Runs in vLLM's environment: what a caller is told when vLLM fails; one line of JSON at the end.

VENV/bin/python vllm_failures.py CHECKPOINT start
    an engine is dropped: the titles of the processes that are left; then a KV cache that is too small for one sequence
VENV/bin/python vllm_failures.py CHECKPOINT PROCESS
    a prompt that is too long; then the process with PROCESS in its title, EngineCore or Worker, is killed while the
    engine generates
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import psutil  # type: ignore[import-untyped]

from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.vllm_engine import load_vllm


def processes(title: str) -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if title in " ".join(child.cmdline())]


def kill(title: str) -> None:
    (process,) = processes(title)
    process.kill()


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def main(checkpoint: str, failure: str) -> None:
    settings = EngineSettings("vllm")
    options = {"enforce_eager": True, "max_model_len": 4096, "kv_cache_memory_bytes": 2**28}
    small = options | {"kv_cache_memory_bytes": 1}
    engine = load_vllm(Path(checkpoint), settings, options)
    if failure == "start":
        assert processes("VLLM::")
        del engine
        left = [" ".join(process.cmdline()) for process in processes("VLLM::")]
        print(json.dumps([left, error_of(lambda: load_vllm(Path(checkpoint), settings, small))]))
        return
    errors = [error_of(lambda: engine.generate([[5], [5] * 100], Sampling(4000)))]
    Timer(1.0, kill, [failure]).start()
    errors.append(error_of(lambda: engine.generate([[5, 9, 11, 40, 30]] * 2000, Sampling(4000))))
    print(json.dumps(errors))


if __name__ == "__main__":  # vLLM's processes import this file
    main(*sys.argv[1:])
