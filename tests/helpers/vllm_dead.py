"""Runs in vLLM's environment: what a caller is told when a process of the engine is killed while it generates.

VENV/bin/python vllm_dead.py CHECKPOINT PROCESS

PROCESS is a part of the killed process's title, `EngineCore` or `Worker`. The last line printed is the error.
"""

import sys
from pathlib import Path
from threading import Timer

import psutil

from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.vllm_engine import load_vllm


def kill(title: str) -> None:
    (process,) = (one for one in psutil.Process().children(recursive=True) if title in " ".join(one.cmdline()))
    process.kill()


def main(checkpoint: str, title: str) -> None:
    engine = load_vllm(Path(checkpoint), EngineSettings("vllm"), {"enforce_eager": True, "max_model_len": 4096})
    Timer(1.0, kill, [title]).start()
    try:
        engine.generate([[5, 9, 11, 40, 30]] * 2000, Sampling(4000))
    except ValueError as error:
        print(error)


if __name__ == "__main__":  # vLLM's processes import this file
    main(*sys.argv[1:])
