"""Runs in vLLM's environment: answers of the engine that writes documents, one line of JSON at the end.

VENV/bin/python vllm_answers.py PARENT '[[prompt token, ...], ...]' MAX_NEW_TOKENS
"""

import json
import os
import sys
from pathlib import Path

from lit_puzzle.generation.sampling import EngineSettings, Sampling
from lit_puzzle.generation.vllm_engine import VLLMEngine
from lit_puzzle.serve.vllm.driver import ENVIRONMENT

quick = {name: value for name, value in ENVIRONMENT.items() if name != "TORCHDYNAMO_DISABLE"}  # the engine compiles
os.environ.update(quick | {"VLLM_CPU_KVCACHE_SPACE": "1"})
parent, prompts, limit = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
found, engine = {}, VLLMEngine(parent, EngineSettings("vllm"))
for temperature in (0.0, 1.0):
    found[temperature] = []
    for asked, seed in ((prompts, 3), (prompts[:2], 3), (prompts, 4)):
        completions = engine.generate(asked, Sampling(limit, temperature, seed=seed))
        found[temperature].append([[done.token_ids, done.finish] for done in completions])
print(json.dumps(found))
