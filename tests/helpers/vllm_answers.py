"""Runs in vLLM's environment: answers of the engine that writes documents, one line of JSON at the end.

VENV/bin/python vllm_answers.py PARENT '[[prompt token, ...], ...]' MAX_NEW_TOKENS
"""

import json
import os
import sys
from pathlib import Path

from lit_puzzle.generation.sampling import Sampling
from lit_puzzle.generation.vllm_engine import vllm_engine
from lit_puzzle.serve.vllm.driver import ENVIRONMENT

quick = {name: value for name, value in ENVIRONMENT.items() if name != "TORCHDYNAMO_DISABLE"}  # the engine compiles
os.environ.update(quick | {"VLLM_CPU_KVCACHE_SPACE": "1"})
parent, prompts, limit = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
found = {}
for temperature in (0.0, 1.0):
    answers = vllm_engine(parent, "float32", Sampling(limit, temperature), 1)
    found[temperature] = [answers(prompts, 3), answers(prompts[:2], 3), answers(prompts, 4)]
print(json.dumps(found))
