"""Runs in vLLM's environment: what a caller is told when vLLM fails, written as a JSON list of three errors.

VENV/bin/python vllm_failures.py CHECKPOINT ERRORS

A prompt is too long; the engine's main process is killed while it generates; another engine gets a KV cache that is too
small for one sequence.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import psutil  # type: ignore[import-untyped]

from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.vllm_engine import load_vllm


def kill_main_process() -> None:
    children = psutil.Process().children()
    (process,) = (child for child in children if "EngineCore" in " ".join(child.cmdline()))
    process.kill()


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def main(checkpoint: str, errors_path: str) -> None:
    settings = EngineSettings("vllm")
    options = {"enforce_eager": True, "max_model_len": 4096, "kv_cache_memory_bytes": 2**28}
    small = options | {"kv_cache_memory_bytes": 1}
    engine = load_vllm(Path(checkpoint), settings, options)
    errors = [error_of(lambda: engine.generate([[5], [5] * 100], Sampling(4000)))]
    Timer(1.0, kill_main_process).start()
    errors.append(error_of(lambda: engine.generate([[5, 9, 11, 40, 30]] * 2000, Sampling(4000))))
    errors.append(error_of(lambda: load_vllm(Path(checkpoint), settings, small)))
    Path(errors_path).write_text(json.dumps(errors))


if __name__ == "__main__":  # vLLM's processes import this file
    main(*sys.argv[1:])
