"""Runs in vLLM's environment: completions of one vLLM and of two that share the prompts, written as JSON.

VENV/bin/python vllm_engines.py CHECKPOINT FOUND

FOUND gets `one` and `two`, the token ids of each completion, and `error`, what is said when the second of two engines
is killed while it generates.
"""

import json
import os
import sys
from pathlib import Path
from threading import Timer
from typing import Any

import psutil  # type: ignore[import-untyped]

from lit_puzzle.generation.data_parallel import DataParallelEngine
from lit_puzzle.generation.load import load_one
from lit_puzzle.generation.processes import PROCESS
from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.serve.vllm.driver import ENVIRONMENT

OPTIONS = {"enforce_eager": True, "max_model_len": 4096, "kv_cache_memory_bytes": 2**28}
PROMPTS = [[1, 8, 3, 13, 14 + n % 7, 20 + n % 5] for n in range(21)]


def kill_second_engine() -> None:
    engines = [child for child in psutil.Process().children() if PROCESS in child.cmdline()]
    engines[1].kill()


def main(checkpoint: str, found_path: str) -> None:
    os.environ.update(ENVIRONMENT)
    settings, sampling = EngineSettings("vllm"), Sampling(24, seed=3)
    two = DataParallelEngine(settings, Path(checkpoint), 2, OPTIONS)
    found: dict[str, Any] = {"two": [done.token_ids for done in two.generate(PROMPTS, sampling)]}
    Timer(2.0, kill_second_engine).start()
    try:
        two.generate([[5, 9, 11, 40, 30]] * 4000, Sampling(4000))
        found["error"] = "no error"
    except ValueError as error:
        found["error"] = str(error)
    del two
    one = load_one(settings, Path(checkpoint), options=OPTIONS)
    found["one"] = [done.token_ids for done in one.generate(PROMPTS, sampling)]
    Path(found_path).write_text(json.dumps(found))


if __name__ == "__main__":  # vLLM's processes import this file
    main(*sys.argv[1:])
