"""Runs in vLLM's environment: what a caller is told when vLLM fails, written as a JSON list of five errors.

VENV/bin/python vllm_failures.py CHECKPOINT ERRORS

A prompt is too long; the engine's main process is killed while it generates; another's while it reads weights; the
connection of a third one closes between two requests; a fourth gets a KV cache that is too small for one sequence.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import psutil  # type: ignore[import-untyped]

from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.vllm_engine import load_vllm


def main_process() -> psutil.Process:
    children = psutil.Process().children()
    (process,) = (child for child in children if "EngineCore" in " ".join(child.cmdline()))
    return process


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
    Timer(1.0, main_process().kill).start()
    errors.append(error_of(lambda: engine.generate([[5, 9, 11, 40, 30]] * 2000, Sampling(4000))))
    engine = load_vllm(Path(checkpoint), settings, options)
    main_process().suspend()  # it never answers
    Timer(1.0, main_process().kill).start()
    errors.append(error_of(lambda: engine.read_folder(Path(checkpoint))))
    engine = load_vllm(Path(checkpoint), settings, options)
    core: Any = engine.model.llm_engine.engine_core
    core.ensure_alive = partial(setattr, core.resources, "engine_dead", True)  # the death is noticed after this check
    core.input_socket.close()
    errors.append(error_of(lambda: engine.generate([[5]], Sampling(4))))
    errors.append(error_of(lambda: load_vllm(Path(checkpoint), settings, small)))
    Path(errors_path).write_text(json.dumps(errors))


if __name__ == "__main__":  # vLLM's processes import this file
    main(*sys.argv[1:])
