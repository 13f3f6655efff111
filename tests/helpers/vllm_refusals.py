"""Run in vLLM's environment: errors of the plugin for folders and settings that it refuses, as one line of JSON.

VENV/bin/python vllm_refusals.py '[[FOLDER, SETTINGS], ...]' '[[FOLDER, RANKS], ...]'
"""

import json
import os
import sys

from lit_puzzle.serve.vllm.driver import ENVIRONMENT

os.environ.update(ENVIRONMENT)

from transformers import AutoConfig
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

from lit_puzzle.serve.vllm.model import check_expert_parallel


def refusal(folder: str, settings: dict[str, object]) -> str:
    try:
        LLM(model=folder, enforce_eager=True, **settings)
    except ValueError as error:
        return str(error)
    finally:
        cleanup_dist_env_and_memory()
    return ""


def parallel_refusal(folder: str, ranks: int) -> str:
    try:
        check_expert_parallel(AutoConfig.from_pretrained(folder), ranks)
    except ValueError as error:
        return str(error)
    return ""


errors = [refusal(folder, settings) for folder, settings in json.loads(sys.argv[1])]
errors += [parallel_refusal(folder, ranks) for folder, ranks in json.loads(sys.argv[2])]
print(json.dumps(errors))
