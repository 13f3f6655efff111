"""Run engines inside vLLM's own environment: read a job (JSON), write the results of each engine (JSON).

    VENV/bin/python -m lit_puzzle.serve.vllm.driver JOB RESULTS
    VENV/bin/python -m lit_puzzle.serve.vllm.driver turns MODEL SETTINGS    (see `lit_puzzle.serve.vllm.turns`)

A job is a list of engines, which are started one after the other in this process: a `model` folder, the `settings` of
`vllm.LLM`, and `steps`. The results are a list for each engine, with one entry for each step:

    {"do": "greedy", "prompts": [[ids]], "tokens": n}   -> [[ids]]; end tokens do not end them
    {"do": "score", "sequences": [[ids]]}               -> [[log-probability of every token but the first]]
    {"do": "forced", "token": id, "tokens": n}          -> {"ids", "finish_reason", "stop_reason"}: every token is id
    {"do": "capacity"}                                  -> {"tokens": of the KV cache, "block": of those, "version",
                                                            "blocks", "requests": of "length" tokens that fit at a time,
                                                            "in_flight": tokens of the batches scheduled at a time}
    {"do": "timed", "requests": n, "prompt": tokens, "generated": tokens, "seed": n}
        -> {"wall", "cpu"}: seconds in which requests of random tokens, sent at once, were all answered
    {"do": "reload", "model": folder, "permute_layer": layer | null, "unit_scales": bool}
        loads the tensors of a folder into the running engine, for negative controls with the experts of one layer
        rotated by one without its router, or with all KV scales set to 1

Memory: that of the largest engine, and one tensor during a reload.
"""

import gc
import json
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, ones_like

from lit_puzzle.model.checkpoint import Checkpoint
from lit_puzzle.model.layout import layer_prefix
from lit_puzzle.serve.vllm.turns import DONE, READY

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: complete errors, and ten times faster to start
    "TORCHDYNAMO_DISABLE": "1",  # otherwise ranking log-probabilities compiles C++ for 15 seconds
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(job_path: str, results_path: str) -> None:
    """Run the job and write the results, if no engine fails."""
    engines = json.loads(Path(job_path).read_text())
    results = [run_engine(engine["model"], engine["settings"], engine["steps"]) for engine in engines]
    Path(results_path).write_text(json.dumps(results))


def take_turns(model: str, settings: dict[str, Any]) -> None:
    """Start an engine, say so, and run one step for each line of standard input.

    This process leads a group of its own; it and what vLLM starts are killed when the input ends, while it starts too.
    """
    steps: queue.Queue[str] = queue.Queue()
    threading.Thread(target=read_steps, args=(steps,), daemon=True).start()
    from vllm import LLM

    engine = LLM(model=model, **settings)
    print(READY, flush=True)
    while True:
        print(f"{DONE}{json.dumps(run_step(engine, json.loads(steps.get())))}", flush=True)


def read_steps(steps: queue.Queue[str]) -> None:
    """Hand on the lines of standard input; at its end, kill this process group."""
    for line in sys.stdin:
        steps.put(line)
    os.killpg(0, signal.SIGKILL)


def run_engine(model: str, settings: dict[str, Any], steps: list[dict[str, Any]]) -> list[Any]:
    """Start an engine, run its steps, and shut it down; return the results."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    engine = LLM(model=model, enforce_eager=True, **settings)
    results = [run_step(engine, step) for step in steps]
    del engine
    LAYERWISE_INFO.clear()  # after a reload it would keep the engine's weights and KV cache
    gc.collect()
    cleanup_dist_env_and_memory()
    return results


def run_step(engine: Any, step: dict[str, Any]) -> Any:
    """Run one step of an engine (the kinds are at the top of this file).

    Raises:
        ValueError: an unknown kind of step.
    """
    match step["do"]:
        case "greedy":
            return greedy(engine, step["prompts"], step["tokens"])
        case "score":
            return score(engine, step["sequences"])
        case "forced":
            return forced(engine, step["token"], step["tokens"])
        case "capacity":
            return capacity(engine)
        case "timed":
            return timed(engine, step["requests"], step["prompt"], step["generated"], step["seed"])
        case "reload":
            weights = changed(Path(step["model"]), step["permute_layer"], step["unit_scales"])
            engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            engine.reset_prefix_cache()
            return None
    raise ValueError(f"step {step['do']!r} is not one of greedy, score, forced, capacity, timed, reload")


def _generate(engine: Any, prompts: list[list[int]], sampling: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, detokenize=False, **sampling)
    return engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)


def greedy(engine: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Return exactly `tokens` greedy tokens after each prompt."""
    outputs = _generate(engine, prompts, {"max_tokens": tokens, "ignore_eos": True})
    return [list(output.outputs[0].token_ids) for output in outputs]


def score(engine: Any, sequences: list[list[int]]) -> list[list[float]]:
    """Return the log-probability of every token given those before it."""
    outputs = _generate(engine, sequences, {"max_tokens": 1, "prompt_logprobs": 0})
    return [
        [scores[token].logprob for token, scores in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for ids, output in zip(sequences, outputs, strict=True)
    ]


def forced(engine: Any, token: int, tokens: int) -> dict[str, Any]:
    """Return a completion whose tokens are all forced to `token`, with the model's own stop tokens."""
    prompt = [token]
    from vllm import SamplingParams

    settings: SamplingParams = engine.get_default_sampling_params()  # of generation_config.json: its end tokens
    settings.temperature, settings.max_tokens, settings.logit_bias = 0, tokens, {token: 100.0}
    output = engine.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)[0].outputs[0]
    return {
        "ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def capacity(engine: Any) -> dict[str, Any]:
    """Return what the KV cache holds, and the version of vLLM."""
    import vllm

    config = engine.llm_engine.vllm_config
    cache = config.cache_config
    return {
        "tokens": cache.num_gpu_blocks * cache.block_size,
        "block": cache.block_size,
        "version": vllm.__version__,
        "blocks": cache.num_gpu_blocks,
        "requests": cache.kv_cache_max_concurrency,
        "length": config.model_config.max_model_len,
        "in_flight": config.max_in_flight_tokens,
    }


def timed(engine: Any, requests: int, prompt: int, generated: int, seed: int) -> dict[str, float]:
    """Return the seconds in which requests of random tokens are continued by exactly `generated` tokens each."""
    draw, vocabulary = random.Random(seed), engine.llm_engine.vllm_config.model_config.get_vocab_size()
    rows = [[draw.randrange(vocabulary) for _ in range(prompt)] for _ in range(requests)]
    wall, cpu = time.perf_counter(), time.process_time()
    _generate(engine, rows, {"max_tokens": generated, "ignore_eos": True})
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def changed(folder: Path, permute_layer: int | None, unit_scales: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a folder, changed for a negative control."""
    checkpoint = Checkpoint(folder)
    names = checkpoint.family.layer
    experts = None if permute_layer is None else f"{layer_prefix(permute_layer)}{names.experts}."
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        if experts is not None and name.startswith(experts):
            tensor = tensor.roll(1, dims=0)
        if unit_scales and name.endswith(names.kv_scales):
            tensor = ones_like(tensor)
        yield name, tensor


if __name__ == "__main__":
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    if sys.argv[1] == "turns":
        take_turns(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main(*sys.argv[1:])
